"""The check of the commands and functions that write their results from one process."""

import os


SERVERS = "For speed use backend='vllm' with several servers, which share the requests."


def check_one_process(command: str, advice: str = "") -> None:
    """
    Refuse to run on several processes of a launcher, each of which would do all the work and write all of it.

    Args:
        command (`str`): the name of the command or function, for the message.
        advice (`str`, *optional*): what to do to use several GPUs, as a sentence.

    Raises:
        ValueError: a launcher started more than one process.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count > 1:
        raise ValueError(
            f"{command} runs in one process, and the launcher started {count}, each of which would do the same work. "
            f"Start it without a launcher. {advice}".rstrip()
        )
