"""An existing Flower app as a task: `fedcore simulate --flower-app DIR`.

The only package of fedcore that imports flwr, and it is imported only where a task is an app.
"""
