"""What runs in a worker's process, beside torch and never with Ray: environment, process group, payload, processes.

torch is imported inside functions only: a worker says hello before it imports torch, and `import raylaunch` is light.
"""
