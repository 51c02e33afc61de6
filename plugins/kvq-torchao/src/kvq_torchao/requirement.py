"""The releases of torchao that this plugin was tested with; its prototypes change from one to the next."""

TORCHAO = "torchao>=0.18,<0.19"
