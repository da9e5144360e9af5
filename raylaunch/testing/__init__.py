"""For tests, yours and ours: real local clusters to hurt, and a simulator of the coordinator."""
