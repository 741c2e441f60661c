"""The toy kernel with a compile that takes a while and says so: when it begins and ends, in the file $SLOW_TOY_LOG."""

import os
import time

from toy_kernel import ToyKernel


def say(what, num_threads):
    with open(os.environ["SLOW_TOY_LOG"], "a", encoding="utf-8") as log:
        log.write(f"{what} {os.getpid()} {num_threads}\n")


class SlowToy(ToyKernel):
    name = "slow_toy"

    def compile_args(self):
        say("begin", self.num_threads)
        time.sleep(0.5)
        say("end", self.num_threads)
        return super().compile_args()
