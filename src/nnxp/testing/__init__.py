"""The parity kit: tests that two backends give matching outputs, for nnxp and for its users."""

from nnxp.testing import goldens as goldens
from nnxp.testing.bounded import NoBound as NoBound
from nnxp.testing.parity import LIMIT as LIMIT
from nnxp.testing.parity import Check as Check
from nnxp.testing.parity import ParityReport as ParityReport
from nnxp.testing.parity import assert_close as assert_close
from nnxp.testing.parity import assert_parity as assert_parity
from nnxp.testing.parity import error_bound as error_bound
from nnxp.testing.parity import parity_report as parity_report
from nnxp.testing.parity import product_bound as product_bound
