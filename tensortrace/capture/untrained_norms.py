"""Whether a norm that is evaluated has ever seen data: it says so itself, in its buffers."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.spectral_norm import SpectralNorm

from tensortrace.capture.gradients import is_training
from tensortrace.capture.unwrap import is_backed, is_dense_cpu, quiet

# Of a power iteration that has run once the two vectors belong together; random ones of three or
# more elements are rarely as near as this.
_NEAR = 0.5


def is_untrained(module: nn.Module) -> bool:
    """Whether a norm is in eval mode with the statistics that it was made with.

    BatchNorm and InstanceNorm with running statistics, and the spectral norm of
    ``torch.nn.utils.spectral_norm`` (that of ``parametrizations`` iterates when it is made). Read
    on the CPU only: elsewhere it would wait for the device.
    """
    if is_training(module):
        return False
    if isinstance(module, _NormBase):
        return _is_as_made(module)
    hooks = module._forward_pre_hooks.values()
    return any(isinstance(hook, SpectralNorm) and _is_random(module, hook) for hook in hooks)


def _is_as_made(norm: _NormBase) -> bool:
    mean, var, count = norm.running_mean, norm.running_var, norm.num_batches_tracked
    if mean is None or var is None or not norm.track_running_stats:
        return False
    # What was loaded from an old file, or ported, has a count of 0 and statistics all the same.
    read = [mean, var] if count is None else [mean, var, count]
    if not all(is_dense_cpu(x) and is_backed(x) for x in read):
        return False
    with quiet():
        counted = count is not None and bool(count)
        return not counted and not mean.any() and bool((var == 1).all())


def _is_random(module: nn.Module, hook: SpectralNorm) -> bool:
    weight, u, v = (getattr(module, hook.name + end, None) for end in ("_orig", "_u", "_v"))
    if weight is None or u is None or v is None:  # taken apart by the user
        return False
    if not all(is_dense_cpu(x) and is_backed(x) for x in (weight, u, v)):
        return False
    with quiet():
        product = torch.mv(hook.reshape_weight_to_matrix(weight), v)
        near = torch.nn.functional.cosine_similarity(product, u, dim=0)
        return len(u) > 2 and float(near) < _NEAR
