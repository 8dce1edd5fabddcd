"""What tests of a real vLLM need: a tiny model, and an engine in a process of its own."""
