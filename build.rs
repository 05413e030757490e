//! Compiles the proto files without `protoc`, keeps their descriptors for
//! reflection, and derives proto3-JSON for the same messages, so that a
//! provisioning file is the RPC's own message.

use std::path::PathBuf;

use prost::Message as _;

const PROTOS: [&str; 6] = [
    "remit/v1/types.proto",
    "remit/v1/authority.proto",
    "remit/v1/provisioning.proto",
    "remit/v1/ledger.proto",
    "remit/v1/approvals.proto",
    "remit/v1/events.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let out = PathBuf::from(std::env::var("OUT_DIR")?);

    let descriptors = protox::compile(PROTOS, ["proto"])?;
    let encoded = descriptors.encode_to_vec();
    std::fs::write(out.join("remit_descriptor.bin"), &encoded)?;

    tonic_prost_build::configure()
        .extern_path(".google.protobuf", "::pbjson_types")
        .compile_well_known_types(true)
        .build_transport(true)
        .compile_fds(descriptors)?;

    pbjson_build::Builder::new()
        .register_descriptors(&encoded)?
        .build(&[".remit.v1"])?;
    Ok(())
}
