"""`tensorway vllm router`: in front of `vllm serve` processes of which some prefill and the others decode.

May import aiohttp (the extra `router`), the core and, of this package, what names hand-overs in requests; no
module of it imports vllm.
"""
