//! `remit`: see [`remit::cli`].

#![forbid(unsafe_code)]

/// Requests are made of many small parts that live for a millisecond; the system's
/// allocator took a sixth of the server's time with them (`docs/performance.md`).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    remit::cli::main()
}
