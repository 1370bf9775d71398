"""How the commands that train begin and end: requests to stop, one message for all ranks, an exit code."""

from collections.abc import Callable
from typing import TypeVar

from pipeline.ending import end_by, end_early
from pipeline.launched import leave_code
from pipeline.stopping import StopRequest, outlive_readers
from pipeline.world import current_world, leave_world

Config = TypeVar("Config")


def run_training(load: Callable[[], Config], train: Callable[[Config, StopRequest], int]) -> int:
    """Read the settings with `load` and train with them; the exit code, of pipeline.ending's.

    Where it cannot go on this process ends here, and the first of all ranks says why.
    """
    outlive_readers()
    stop = StopRequest(at_once=end_early)
    stop.listen()
    is_loaded = False
    try:
        config = load()
        is_loaded = True
        code = train(config, stop)
        leave_world()
    except Exception as error:  # noqa: BLE001 (a bug, too, must not leave the other ranks waiting)
        world = current_world()
        end_by(error, world.roll_call if world else None, is_alike=not is_loaded)
    leave_code(code)
    return code
