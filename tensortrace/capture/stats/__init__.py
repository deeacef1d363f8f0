"""The numbers of a tensor: how many elements are not finite, their range, mean and norm.

`queue` is what is asked. It has a tensor in host memory measured by the compiled kernel, by a few
reductions of torch's (`kernels`) or together with other small ones (`gather`), one elsewhere by
`devices`, on a GPU by `cuda/`. `exponents`, `rows` and `units` look closer; `unwrap`, one folder
up, says what can be measured.
"""
