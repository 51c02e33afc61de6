"""Where transformers is held at arm's length: private names, names of modules, kinds of layers."""
