"The Ray executor on two nodes of this machine, one of them killed in the middle of a batch."
import signal
import pytest
from conftest import RECORD
ray = pytest.importorskip("ray", reason="needs slmkit[ray]")
from slmkit.run import batch as runner
from slmkit.run import records
from slmkit.run.progress import Console
from slmkit.run.plan import plan
from test_runner import RIGHT, right

@pytest.fixture
def cluster(monkeypatch):
    from ray.cluster_utils import Cluster
    def late(*a): raise TimeoutError("the Ray cluster did not answer within 150 s")
    signal.signal(signal.SIGALRM, late); signal.alarm(150)
    monkeypatch.setattr(
        ray._private.ray_constants, "ENABLE_RAY_CLUSTER", False
    )  # else 127.0.0.1 becomes this host's outer address
    c = Cluster(
        initialize_head=True, head_node_args=dict(num_cpus=1, node_ip_address="127.0.0.1", include_dashboard=False)
    )
    c.second = c.add_node(num_cpus=1, node_ip_address="127.0.0.1")
    c.wait_for_nodes()
    yield c
    ray.shutdown(); c.shutdown(); signal.alarm(0)

def test_a_lost_node_costs_no_run(tiny, tmp_path, cluster):
    "Twelve runs over two nodes; after the first results one node goes; all twelve records are right, with notebooks."
    class Watch(Console):
        def finished(self, run, record, elsewhere=False):
            super().finished(run, record, elsewhere)
            if cluster.second: cluster.remove_node(cluster.second, allow_graceful=False); cluster.second = None
    path, folder = tiny("t", *RIGHT, "import time; time.sleep(.5)"), tmp_path/"r"
    runs = plan([("t", path)], "smoke", list(range(12)))
    found = runner.execute(runs, folder, executor="ray", address=cluster.address, console=Watch("quiet"))
    assert cluster.second is None and [r["status"] for r in found] == ["ok"] * 12, [
        (r["status"], r["error"]) for r in found
    ]
    assert [r["claims"]["tiny"]["value"] for r in found] == [right(r["seed"], .5) for r in found]
    assert all((folder/r["notebook"]).exists() for r in found) and len(records.reading(folder)[0]) == 12

def test_failures_come_back_from_ray(tiny, tmp_path, cluster):
    path = tiny("f", RECORD, "import os\nif seed == 1: os._exit(3)\nif seed == 2: 1/0\nc.record(1)")
    found = runner.execute(
        plan([("f", path)], "smoke", [0, 1, 2]), tmp_path / "r", executor="ray", address=cluster.address
    )
    assert [r["status"] for r in found] == ["ok", "exit", "error"] and all(
        (tmp_path / "r" / r["notebook"]).exists() for r in found
    )
