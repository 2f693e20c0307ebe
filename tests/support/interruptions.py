"""Interruptions of an engine: before a given instruction, or by a real signal."""

import functools
import os
import signal
import sys
import threading

from jax_causal_conv.mamba2 import Engine

ENGINE_FILES = os.path.dirname(Engine.step.__code__.co_filename)


class Interrupter:
    """Raises KeyboardInterrupt before the given instruction of the engine's modules.

    Attributes:
        count: instructions of these modules that have been executed.
        where: the name of the function that was interrupted.
    """

    def __init__(self, moment=None):
        self.moment = moment
        self.count = 0
        self.where = None

    def __enter__(self):
        self.previous = sys.gettrace()
        # Python 3.12 tells of instructions only if a frame wants to hear of them before
        # tracing begins.
        sys._getframe().f_trace_opcodes = True
        sys.settrace(self.enter)
        return self

    def __exit__(self, *_):
        sys.settrace(self.previous)

    def enter(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(ENGINE_FILES):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self.count_instruction

    def count_instruction(self, frame, event, _):
        if event == "opcode":
            self.count += 1
            if self.count == self.moment:
                self.where = frame.f_code.co_name
                raise KeyboardInterrupt  # which ends all tracing
        return self.count_instruction


class Timer:
    """A real signal after so many seconds, whose handler raises KeyboardInterrupt."""

    def __init__(self, number):
        self.number = number
        self.armed = False

    def __enter__(self):
        self.previous = signal.signal(self.number, self.handle)
        return self

    def __exit__(self, *_):
        signal.signal(self.number, self.previous)

    def handle(self, *_):
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt

    def call(self, seconds, function):
        """Calls it, and says whether it was interrupted."""
        send = functools.partial(
            signal.pthread_kill, threading.get_ident(), self.number
        )
        timer = threading.Timer(seconds, send)
        try:
            self.armed = True
            if self.number == signal.SIGALRM:
                signal.setitimer(signal.ITIMER_REAL, seconds)
            else:
                timer.start()
            function()
        except KeyboardInterrupt:
            return True
        finally:
            self.armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            if timer.ident is not None:
                timer.join()
        return False
