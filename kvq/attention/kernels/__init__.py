"""The kernels, a folder or a file each; `own_kernels` lists them."""
