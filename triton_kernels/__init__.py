"""Triton kernels, one op per file; installed as ``commfuse.triton_kernels``.

A kernel file holds the kernel and a thin launcher. The wait and signal primitives that all of them
share, with the memory layout that they work on, are in ``protocol``.

Nothing is imported here: importing Triton takes a second, and ``TRITON_INTERPRET`` is read when a
kernel is defined, so that a program must be able to set it first.
"""

# The Triton project installs a package of its own under the bare name. If this folder answered to
# it (because the root of a clone is on sys.path), programs that want theirs would get ours.
if __name__ == "triton_kernels":
    raise ImportError(
        "commfuse's Triton kernels cannot be imported as 'triton_kernels': that name belongs to a "
        "package of the Triton project. Import commfuse.triton_kernels (install commfuse first: "
        "pip install --no-build-isolation -e .), and keep the root of commfuse's source tree off "
        "sys.path if you want Triton's package."
    )
