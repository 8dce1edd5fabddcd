"""Tensorway in vLLM. Importing this, its plugin or its command imports nothing of vllm."""
