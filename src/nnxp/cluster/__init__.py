"""Any number of rows through a model, block by block, on as many processes as there are.

A folder holds the plan (which rows make which block), one file for each block that is done, and
beside it a record with its sha256. So a sweep can be killed at any moment and started again.
"""

from nnxp.cluster import dask as dask
from nnxp.cluster.blocks import Setting as Setting
from nnxp.cluster.blocks import run_block as run_block
from nnxp.cluster.folder import Parts as Parts
from nnxp.cluster.folder import Status as Status
from nnxp.cluster.folder import open as open
from nnxp.cluster.folder import status as status
from nnxp.cluster.plan import Plan as Plan
from nnxp.cluster.sweeping import Report as Report
from nnxp.cluster.sweeping import sweep as sweep
from nnxp.cluster.verifying import Verified as Verified
from nnxp.cluster.verifying import verify as verify
