"""This machine: its processor, the environment variables, the files that are kept between processes."""
