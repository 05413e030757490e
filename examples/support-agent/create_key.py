"""Makes a key for acme's agents with the operator's key, and prints it."""

import sys
import uuid

from remit_client import connect  # puts the stubs on the path

from remit.v1 import provisioning_pb2, provisioning_pb2_grpc


def main():
    target, operator_key = sys.argv[1], open(sys.argv[2]).read().strip()
    answer = provisioning_pb2_grpc.ProvisioningStub(connect(target)).CreateApiKey(
        provisioning_pb2.CreateApiKeyRequest(
            idempotency_key=str(uuid.uuid4()),
            api_key=provisioning_pb2.ApiKey(
                tenant="acme",
                display_name="support agent",
                permissions=[
                    provisioning_pb2.PERMISSION_AUTHORITY,
                    provisioning_pb2.PERMISSION_READ,
                ],
            ),
        ),
        metadata=[("authorization", f"Bearer {operator_key}")],
        timeout=5,
    )
    print(answer.secret)


if __name__ == "__main__":
    main()
