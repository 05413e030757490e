//! `remit`: see [`remit::cli`].

#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    remit::cli::main()
}
