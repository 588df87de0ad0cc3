"""What a compiled program holds at most."""

import jax


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes of arguments, temporaries and results that are not written over arguments.

    Args:
      compiled: the program.

    Returns:
      The bytes; 0 where the backend does not tell.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + results
