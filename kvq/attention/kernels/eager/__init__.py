"""The reference: any request, any device, one piece of the history after another."""
