"""The trainer's machinery: nothing in this folder changes what is learned."""
