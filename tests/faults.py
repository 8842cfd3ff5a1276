"""Sources for tiers whose reads a test can hold back, count, and let fail; and no memory at all."""

import random
import threading


class Blobs:
    """Every byte of an expert's blob is `32 * layer + expert`."""

    def __init__(self, held=False):
        self.reads = []
        self.failing = set()  # keys whose reads fail
        self.started = threading.Semaphore(0)  # one for each read that has begun
        self._go = threading.Event()
        if not held:
            self._go.set()

    def release(self):
        self._go.set()

    def hold(self):
        self._go.clear()

    def read_into(self, key, buffer):
        self.reads.append(key)
        self.started.release()
        assert self._go.wait(60)
        if key in self.failing:
            raise OSError("the disk is on fire")
        buffer[:] = 32 * key.layer + key.expert


class Unreliable(Blobs):
    """Some reads fail; slow ones wait until another that is under way has ended. Seeded."""

    def __init__(self, seed, failures=0.1, slow=0.3):
        super().__init__()
        self.failures = failures
        self._slow = slow
        self._random = random.Random(seed)
        self._changed = threading.Condition()
        self._quick = 0  # reads under way that wait for nobody
        self._ended = 0

    def read_into(self, key, buffer):
        with self._changed:
            fails = self._random.random() < self.failures
            slow = self._random.random() < self._slow and self._quick > 0
            buffer[:] = 255  # what is half read must never be seen
            if slow:
                ended = self._ended
                self._changed.wait_for(lambda: self._ended > ended)
            else:
                self._quick += 1
        try:
            if fails:
                raise OSError("injected")
            super().read_into(key, buffer)
        finally:
            with self._changed:
                self._quick -= not slow
                self._ended += 1
                self._changed.notify_all()


class NullMemory:
    """Slots that hold nothing."""

    def __init__(self, space):
        self.space = space

    def slot(self, slot):
        return None

    def place(self, slot):
        return slot

    def fit(self, slot, nbytes):
        pass

    def give_back(self, slot):
        pass

    def is_locked(self, slot):
        return False

    def close(self):
        pass
