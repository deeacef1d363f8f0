"""Losses, layers and nodes known by name: an op is its function, a module its class.

A check that means other ones, fewer or more, has a set of its own.
"""

from __future__ import annotations

# How far predictions are from targets, element by element.
DISTANCE_OPS = frozenset(("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"))
DISTANCE_MODULES = frozenset(("MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss"))
# Of one class out of many, each target a number or probabilities.
CLASS_OPS = frozenset(("cross_entropy", "nll_loss"))
CLASS_MODULES = frozenset(("CrossEntropyLoss", "NLLLoss"))
CLASS_LOSSES = CLASS_OPS | CLASS_MODULES
# Of yes or no.
BINARY_OPS = frozenset(("binary_cross_entropy", "binary_cross_entropy_with_logits"))
BINARY_LOSSES = BINARY_OPS | {"BCELoss", "BCEWithLogitsLoss"}
# Layers that do something else in eval mode, by the beginning of their class.
BATCH_NORMS = ("BatchNorm", "SyncBatchNorm", "LazyBatchNorm")
DROPOUTS = ("Dropout", "AlphaDropout", "FeatureAlphaDropout")
# Nodes that pass values on and change none: views, copies, casts, and bounds on probabilities.
PASSING = frozenset(
    f"{name}Backward{n}"
    for name in (
        "View", "UnsafeView", "ReshapeAlias", "Transpose", "T", "Permute", "ToCopy", "Clone",
        "Squeeze", "Unsqueeze", "Slice", "Select", "Index", "IndexSelect", "Alias", "Expand",
        "AsStrided", "Split", "SplitWithSizes", "Unbind", "Clamp", "ClampMin", "MaskedSelect",
    )
    for n in range(4)
)  # fmt: skip
