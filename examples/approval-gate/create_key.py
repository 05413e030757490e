"""Makes a key of tenant shop with the operator's key, and prints it: create_key.py
TARGET KEY_FILE [GROUP]. Without a group it may act, with one it may approve."""

import sys
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support-agent"))

from remit_client import connect  # noqa: E402  (puts the stubs on the path)

from remit.v1 import provisioning_pb2, provisioning_pb2_grpc  # noqa: E402


def main():
    target, operator_key, *groups = sys.argv[1:]
    acts = [provisioning_pb2.PERMISSION_AUTHORITY, provisioning_pb2.PERMISSION_READ]
    approves = [provisioning_pb2.PERMISSION_APPROVE]
    answer = provisioning_pb2_grpc.ProvisioningStub(connect(target)).CreateApiKey(
        provisioning_pb2.CreateApiKeyRequest(
            idempotency_key=str(uuid.uuid4()),
            api_key=provisioning_pb2.ApiKey(
                tenant="shop",
                permissions=approves if groups else acts,
                approver_groups=groups,
            ),
        ),
        metadata=[("authorization", f"Bearer {Path(operator_key).read_text().strip()}")],
        timeout=10,
    )
    print(answer.secret)


if __name__ == "__main__":
    main()
