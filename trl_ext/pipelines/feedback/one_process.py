"""The check of the commands of this folder that write one folder from one process."""

import os


def check_one_process(command: str) -> None:
    """
    Refuse to run on several processes of a launcher, each of which would do all the work.

    Args:
        command (`str`): the name of the command or function, for the message.

    Raises:
        ValueError: a launcher started more than one process.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count > 1:
        raise ValueError(
            f"{command} runs in one process, and the launcher started {count}, each of which would do the same work. "
            "Start it without a launcher. For speed use backend='vllm' with several servers, which share the requests."
        )
