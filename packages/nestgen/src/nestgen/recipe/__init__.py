"""The experiment: one YAML file, its sections, and what follows from it alone: where runs and stores are, how a level is
sampled, the paper's protocols.

Imports nothing of the package but the root modules.
"""
