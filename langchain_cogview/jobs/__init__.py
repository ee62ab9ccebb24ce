"""Many pictures as a job: a file of prompts, a folder with a manifest, and no picture paid twice however often it is killed.

>>> report = run_job("prompts.txt", "pictures", base_url="sandbox:")    # doctest: +SKIP
>>> print(report)                                                       # doctest: +SKIP
"""

from langchain_cogview.jobs.job import arun_job, plan_job, run_job
from langchain_cogview.jobs.plan import JobPlan, Problem, UnknownAttempt
from langchain_cogview.jobs.report import JobReport

__all__ = ["JobPlan", "JobReport", "Problem", "UnknownAttempt", "arun_job", "plan_job", "run_job"]
