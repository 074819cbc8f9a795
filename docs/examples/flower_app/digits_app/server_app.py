"""The ServerApp: one strategy, started as any of Flower's own."""

import time

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from safetensors.torch import save_file

from digits_app.task import new_model
from strategies.geometric import Geometric

app = ServerApp()

DEFAULTS = {"clients": 5, "rounds": 20, "lr": 0.01, "out": "digits.safetensors"}


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = DEFAULTS | dict(context.run_config)
    while len(list(grid.get_node_ids())) < config["clients"]:  # the strategy takes whoever is connected
        time.sleep(1)
    strategy = Geometric(server_optimizer={"name": "Adam", "lr": config["lr"]})
    initial = ArrayRecord(new_model().state_dict())
    result = strategy.start(grid=grid, initial_arrays=initial, num_rounds=config["rounds"])
    save_file(result.arrays.to_torch_state_dict(), config["out"])
    last = result.evaluate_metrics_clientapp[config["rounds"]]
    print(f"after {config['rounds']} rounds: loss {last['loss']:.3f}, accuracy {last['accuracy']:.3f} in the mean over clients")
