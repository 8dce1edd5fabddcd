"""Communicators and placement policies of Tensorway in vLLM's expert balancing, for operators who ask for them.

`options` is what they ask with, `hook` what is put in vLLM's place, `expected` what vLLM must look like for that.
Importing this, or any of these three, imports nothing of vllm.
"""
