"""A pretended GPU: the project's code runs as if on cuda:0, on a machine that has none.

Whatever the code puts on "cuda" becomes a `PretendedTensor`. It claims to be on cuda:0 while an ordinary CPU tensor
holds its values, so control flow, autograd, optimizers and Lightning's loops are real. See `device.pretended_cuda`.

- `tensor`: the tensor, and the operations that CUDA would refuse.
- `surface`: Python calls that name a device or take values out of a tensor.
- `device`: the context manager; it stands in for `torch.cuda` and undoes everything.
- `waits`: counts where the host waits for the device; `wait_table`: the committed counts.
- `cases`: every stage and its variants, small.
- `memory`: bytes that live tensors hold.
- `real_dimensions`: the phases of a model with its real dimensions and no values.

Limits: autocast runs as CPU autocast, CUDA kernels' own rules for dtypes are not checked, streams do nothing (so races
stay unseen), and threads other than the caller's see no pretended device.
"""
