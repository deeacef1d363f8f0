"""All that touches a live program: the recording half, the only one that imports torch.

Where a tensor goes: a hook meets it (`modules`, `gradients`, `autograd_functions`, `ops/`, `loop/`,
`lines/`), `tensors` numbers it or knows it again, `stats/` measures it, and a draft of a record
(`drafts`) waits for the numbers. All hooks know of a run is its `receiver`: the `recorder`, which
keeps drafts until the gate. There `outbox` makes records of them, `journal` has them checked and
written, and `replay/` runs a call again, with a receiver of its own, whose op is still to be found.
`tracer` is `trace()` itself, which puts the hooks on and takes them off.

Beside that way: `source` finds the user's line, `names` and `described` the module, `flatten` and
`unwrap` look at tensors, `compiled/` is what is written in C; `roots` keeps calls for `replay/`,
`rest` and `turns` say what is not looked at, `summary` makes the step line, `exceptions` collects
what is known of an error, `active` has the one slot by which hooks find the recorder.
"""
