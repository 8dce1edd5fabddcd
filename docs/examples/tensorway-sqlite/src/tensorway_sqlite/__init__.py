"""The backend `sqlite`, of kind `offload_tier`, for Tensorway.

Nothing is imported here: the host finds this dist by its metadata, and imports `offers` when somebody asks for the
backend.
"""
