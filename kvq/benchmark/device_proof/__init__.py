"""What `kvq doctor --prove --device` measures of the Triton kernel on a GPU, and the record that it writes."""
