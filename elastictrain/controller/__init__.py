"""The controller: decides layouts, and is never on the path of a step. Pure: no Ray, no torch, no clock, no threads."""

from elastictrain.controller.adoption import bring_back as bring_back
from elastictrain.controller.adoption import outstanding as outstanding
from elastictrain.controller.adoption import reconcile as reconcile
from elastictrain.controller.budgets import FailureBudget as FailureBudget
from elastictrain.controller.facts import MachineSpec as MachineSpec
from elastictrain.controller.invariants import Watch as Watch
from elastictrain.controller.invariants import check_invariants as check_invariants
from elastictrain.controller.journal import dump_event as dump_event
from elastictrain.controller.journal import load_event as load_event
from elastictrain.controller.journal import read_events as read_events
from elastictrain.controller.journal import replay as replay
from elastictrain.controller.machine import Machine as Machine
from elastictrain.controller.phases import TRANSITIONS as TRANSITIONS
from elastictrain.controller.phases import Phase as Phase
from elastictrain.controller.phases import diagram as diagram
from elastictrain.controller.view import view as view
