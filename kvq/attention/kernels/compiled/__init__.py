"""The compiled CPU kernel: one C file, built for the machine at its first use and kept on disk."""
