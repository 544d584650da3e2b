"""Carries out a plan on a run: strikes when it is time, starts the same command again, and sees what becomes of it."""

import contextlib
import shutil
import signal
import time
from collections.abc import Callable

import psutil

from data_prep.checksum_list import find_damage
from pretrain.checkpoints.checkpoint_folder import (
    CHECKPOINTS_FOLDER,
    find_checkpoints,
    newest_checkpoint,
    read_step,
)
from pretrain.config import LOGS_FOLDER
from pretrain.run_record.run_logs import rank_log
from soak import orders, small_disk
from soak.damage import corrupt_file, damage_checkpoint
from soak.faults import Fault
from soak.outcomes import Outcome, SoakResult
from soak.plan import SoakPlan, StartPlan
from soak.run_process import is_saving
from soak.soak_recipe import DATA_FOLDER
from soak.watched_run import EndedError, StuckError, WatchedRun

SPARE_STARTS = 3
STACK_WORDS = "most recent call first"  # how Python begins the stack of a thread
WRITER_TRIES = 20  # a writer that is struck may just have finished


class Supervisor:
    """Brings a run under faults to its end."""

    def __init__(self, run: WatchedRun, report: Callable[[SoakResult], object] = lambda result: None) -> None:
        """`report` is told how things stand after every start."""
        self.run, self.report = run, report

    def carry_out(self, plan: SoakPlan) -> SoakResult:
        """All starts of the plan, then on to the end of the run."""
        run = self.run
        began = time.monotonic()
        try:
            for start in plan.starts:
                self.start_and_strike(start)
                self.report(run.result)
            self.run_to_end()
        finally:
            if run.process is not None:
                run.process.end()
        run.result.wall_seconds = time.monotonic() - began
        self.note_nan_gradients(plan)
        self.report(run.result)
        return run.result

    def start_and_strike(self, plan: StartPlan) -> None:
        """One start, its faults, and the damage after its end."""
        self.run.start()
        try:
            if plan.passing is not None:
                self.strike_passing(plan.passing)
            self.strike_ending(plan.ending, checkpoints=2 if plan.down else 0)
        except (EndedError, StuckError) as error:
            self.run.problem(str(error))
            self.run.end()
        if plan.down is not None:
            if plan.down.name == "corrupt_data":
                self.refuse_corrupt_data(plan.down)
            else:
                self.damage_newest(plan.down)

    def run_to_end(self) -> None:
        """Start the run until it is done."""
        run = self.run
        for _ in range(SPARE_STARTS):
            run.start()
            try:
                run.wait_for_end()
            except StuckError as error:
                run.problem(str(error))
            code = run.end()
            if code == 0 and run.is_finished():
                return
            run.problem(f"ended with exit code {code}, without a fault")
        run.problem(f"the run is at step {run.furthest} of {run.recipe.training.steps}")

    # Faults that end a start

    def strike_ending(self, fault: Fault, checkpoints: int) -> None:
        """Wait for the moment, strike, and see how the start ends; not before there are so many checkpoints."""
        run, process = self.run, self.run.running()
        if fault.name == "kill_while_starting":
            run.wait(lambda: len(process.ranks()) == run.ranks, "its ranks")
        else:
            target = run.furthest + fault.after_steps
            run.wait(lambda: run.furthest >= target, f"step {target}")
            run.wait(lambda: len(find_checkpoints(run.folder)) >= checkpoints, f"{checkpoints} checkpoints")
        time.sleep(fault.delay_seconds)
        if fault.name.endswith("mid_save"):
            run.wait(lambda: is_saving(run.folder), "a save")
        process.ranks()  # those that outlive a killed launcher have to be known before
        outcome = run.strike(fault)
        self.bring_down(fault)
        self.see_end(outcome)
        if fault.name == "hang_rank":
            self.find_stacks(outcome)

    def bring_down(self, fault: Fault) -> None:
        """Do it."""
        process, name = self.run.running(), fault.name
        ranks = process.ranks()
        with contextlib.suppress(psutil.NoSuchProcess, KeyError):  # it has just ended by itself
            if name in ("kill_rank", "kill_rank_mid_save", "kill_while_starting"):
                ranks[fault.rank].kill()
            elif name in ("kill_all_ranks", "kill_all_ranks_mid_save"):
                for rank in ranks.values():
                    rank.kill()
            elif name == "kill_launcher":
                process.launcher.kill()
            elif name == "sigterm_rank":
                ranks[fault.rank].terminate()
            elif name == "sigusr1_launcher":
                process.launcher.send_signal(signal.SIGUSR1)
            else:
                orders.order_hang(self.run.recipe_file, fault.rank)

    def see_end(self, outcome: Outcome) -> None:
        """Wait for the end of this start, which has to be the one that the fault brings about."""
        self.run.wait_for_end()
        code = self.run.end()
        assert outcome.fault.kind.exit_code is not None, outcome.fault.name
        outcome.met(code, outcome.fault.kind.exit_code)
        assert self.run.down is not None, "it has ended"
        self.run.down.endings.append(outcome)
        if outcome.fault.kind.group == "ending":
            self.run.await_new_step(outcome)

    def find_stacks(self, outcome: Outcome) -> None:
        """A hang has to leave the stacks of every rank."""
        logs = self.rank_logs()
        with_stacks = [rank for rank, text in logs.items() if STACK_WORDS in text]
        if len(with_stacks) < self.run.ranks:
            outcome.problems.append(f"stacks only of ranks {with_stacks}")

    def rank_logs(self) -> dict[int, str]:
        """What the ranks of the newest start said."""
        starts = [path for path in (self.run.folder / LOGS_FOLDER).iterdir() if path.is_dir()]
        newest = max(starts, key=lambda folder: folder.stat().st_mtime)
        files = [rank_log(newest, rank) for rank in range(self.run.ranks)]
        return {rank: file.read_text(errors="replace") for rank, file in enumerate(files) if file.exists()}

    # Faults while it is down

    def damage_newest(self, fault: Fault) -> None:
        """Damage a file of the newest checkpoint; the next start has to fall back to the one before."""
        run = self.run
        checkpoints = find_checkpoints(run.folder)
        if len(checkpoints) < 2 or run.down is None or run.down.damage is not None:
            run.problem(f"{fault.kind.title}: there is no second checkpoint to fall back to")
            return
        outcome = run.strike(fault)
        outcome.happened = damage_checkpoint(checkpoints[-1], fault)
        shutil.copytree(checkpoints[-1], run.work / "damaged" / f"after_start_{run.result.starts:03d}")
        run.down.damage = outcome
        run.down.expected = read_step(checkpoints[-2])

    def refuse_corrupt_data(self, fault: Fault) -> None:
        """Start the run on damaged data: it has to refuse them, and to say which; then give it the whole ones."""
        shard = min((self.run.work / DATA_FOLDER / "train").glob("*.bin"))
        with corrupt_file(shard, fault.place) as where:
            self.run.start()
            with contextlib.suppress(StuckError):
                self.run.wait_for_end()
            outcome = self.run.strike(fault, where)
            self.see_end(outcome)
        if not any(shard.name in text for text in self.rank_logs().values()):
            outcome.problems.append(f"the message does not name {shard.name}")

    # Faults that pass

    def strike_passing(self, fault: Fault) -> None:
        """Wait for the moment, strike while a checkpoint is written, and see one written in the end."""
        run = self.run
        target = run.furthest + fault.after_steps
        run.wait(lambda: run.furthest >= target and run.newest_step() > 0, f"step {target}")
        outcome = self.fill_disk(fault) if fault.name == "fill_disk" else self.disturb_writer(fault)
        saved = len(run.events("saved"))
        run.wait(lambda: len(run.events("saved")) > saved, "a checkpoint after the fault")
        run.wait(lambda: outcome.seconds_lost is not None, "a step after the fault")

    def fill_disk(self, fault: Fault) -> Outcome:
        """Take all room until a save has failed; the last checkpoint has to stay whole."""
        run = self.run
        checkpoints = run.folder / CHECKPOINTS_FOLDER
        failed = len(run.events("save_failed"))
        small_disk.fill(checkpoints)
        outcome = run.strike(fault)
        try:
            run.wait(lambda: len(run.events("save_failed")) > failed, "a failed save")
        finally:
            newest = newest_checkpoint(run.folder)
            damage = find_damage(newest) if newest else "is gone"
            small_disk.make_room(checkpoints)
        if damage:
            outcome.problems.append(f"the last checkpoint: {damage}")
        return outcome

    def disturb_writer(self, fault: Fault) -> Outcome:
        """Kill or stop the writer of a rank; once more where it had finished just before."""
        run = self.run
        failed = len(run.events("save_failed"))
        for _ in range(WRITER_TRIES):
            writer = self.await_writer(fault.rank)
            saved = len(run.events("saved"))
            outcome = run.strike(fault)
            with contextlib.suppress(psutil.NoSuchProcess):
                writer.send_signal(signal.SIGKILL if fault.name == "kill_writer" else signal.SIGSTOP)
            self.await_save_end(saved, failed)
            if len(run.events("save_failed")) > failed:
                if writer.is_running() and writer.status() == psutil.STATUS_STOPPED:
                    outcome.problems.append("the writer that stood still was left behind")
                return outcome
            run.take_back(outcome)
        raise StuckError(f"{fault.kind.title}: it had always finished before")

    def await_writer(self, rank: int) -> psutil.Process:
        """The writer of a rank, as soon as there is one."""
        found: dict[int, psutil.Process] = {}

        def is_there() -> bool:
            found.update(self.run.running().writers())
            return rank in found

        self.run.wait(is_there, "a checkpoint writer")
        return found[rank]

    def await_save_end(self, saved: int, failed: int) -> None:
        """Until more saves are done or failed than there were."""
        run = self.run
        run.wait(
            lambda: len(run.events("save_failed")) > failed or len(run.events("saved")) > saved,
            "the end of a save",
        )

    def note_nan_gradients(self, plan: SoakPlan) -> None:
        """They are in the uninterrupted run too; here they have to be counted and passed."""
        run = self.run
        skipped = {event["facts"]["step"] for event in run.events("bad_step")}
        for fault in plan.nan_gradients:
            outcome = Outcome(fault=fault, start=0, struck=0.0, happened=f"in step {fault.after_steps}")
            outcome.seconds_lost = 0.0 if run.furthest > fault.after_steps else None
            if fault.after_steps not in skipped:
                outcome.problems.append("history.jsonl does not say that the step was skipped")
            run.result.outcomes.append(outcome)
