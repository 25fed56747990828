"""A virtual cluster and clock that drive the real controller: a day of ten thousand workers in seconds. Pure, but for
the random numbers of a seeded `random.Random`, which are an input of a simulation.
"""

from elastictrain.sim.books import Violation as Violation
from elastictrain.sim.pipeline_report import PipelineReport as PipelineReport
from elastictrain.sim.pipeline_report import simulate_pipelines as simulate_pipelines
from elastictrain.sim.report import Outages as Outages
from elastictrain.sim.report import Report as Report
from elastictrain.sim.run import simulate as simulate
from elastictrain.sim.scenario import Costs as Costs
from elastictrain.sim.scenario import FaultRates as FaultRates
from elastictrain.sim.scenario import Scenario as Scenario
from elastictrain.sim.scenario import make_scenario as make_scenario
from elastictrain.sim.scenario import read_settings as read_settings
