"""`TensorwayOffloadingSpec` and the connector that hears of failures: vLLM offloads to any backend of Tensorway.

May import this package. vLLM makes a `spec` on both sides: `manager` answers its scheduler, `worker` is beside a rank's
memory, `words` goes between them. `pages` and `inside` say what lies where, and import no vLLM.
"""
