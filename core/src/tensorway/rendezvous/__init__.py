"""How endpoints find and trust each other: records with leases and watches, members, hosts, environments.

Room `rendezvous`; may import the ground and `transport`.
"""
