//! Processor time and memory of processes, from `/proc`. Elsewhere than on Linux
//! nothing is known.

use std::time::Duration;

/// Processor time that was used up to now.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Usage {
    /// By the servers.
    pub(super) server: Duration,
    /// By PostgreSQL, all of its processes.
    pub(super) postgres: Duration,
    /// By this process.
    pub(super) load: Duration,
    /// By everything on the machine, those three included.
    pub(super) machine: Duration,
}

impl Usage {
    /// What was used since an earlier reading.
    pub(super) fn since(self, earlier: Self) -> Self {
        Self {
            server: self.server.saturating_sub(earlier.server),
            postgres: self.postgres.saturating_sub(earlier.postgres),
            load: self.load.saturating_sub(earlier.load),
            machine: self.machine.saturating_sub(earlier.machine),
        }
    }

    /// By those who have nothing to do with the measurement.
    pub(super) fn others(self) -> Duration {
        let own = self.server + self.postgres + self.load;
        self.machine.saturating_sub(own)
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use std::time::Duration;

    use procfs::process::{Process, Stat, all_processes};
    use procfs::{CurrentSI as _, KernelStats};

    fn ticks(count: u64) -> Duration {
        Duration::from_millis(count.saturating_mul(1_000) / procfs::ticks_per_second().max(1))
    }

    fn of(stat: &Stat) -> Duration {
        ticks(stat.utime + stat.stime)
    }

    /// A process, and what it has reaped.
    fn with_reaped(stat: &Stat) -> Duration {
        let reaped = stat.cutime + stat.cstime;
        of(stat) + ticks(u64::try_from(reaped).unwrap_or(0))
    }

    pub(in super::super) fn read(servers: &[u32], postmaster: Option<i32>) -> super::Usage {
        let process = |pid: u32| {
            let pid = i32::try_from(pid).ok()?;
            Process::new(pid).ok()?.stat().ok()
        };
        let server = servers.iter().filter_map(|pid| process(*pid));
        let postgres = postmaster.map(|pid| {
            let all = all_processes().into_iter().flatten();
            all.filter_map(|process| process.ok()?.stat().ok())
                .map(|stat| match stat {
                    stat if stat.pid == pid => with_reaped(&stat),
                    stat if stat.ppid == pid => of(&stat),
                    _ => Duration::ZERO,
                })
                .sum()
        });
        let machine = KernelStats::current().map(|stats| {
            let all = stats.total;
            ticks(
                all.user + all.nice + all.system + all.irq.unwrap_or(0) + all.softirq.unwrap_or(0),
            )
        });
        super::Usage {
            server: server.map(|stat| of(&stat)).sum(),
            postgres: postgres.unwrap_or_default(),
            load: process(std::process::id()).map_or(Duration::ZERO, |stat| of(&stat)),
            machine: machine.unwrap_or_default(),
        }
    }

    pub(in super::super) fn resident(pid: u32) -> Option<u64> {
        let status = Process::new(i32::try_from(pid).ok()?).ok()?.status().ok()?;
        status.vmrss
    }
}

#[cfg(target_os = "linux")]
pub(super) use linux::read;

#[cfg(not(target_os = "linux"))]
pub(super) fn read(_servers: &[u32], _postmaster: Option<i32>) -> Usage {
    Usage::default()
}

/// Resident memory of these processes together, in MiB.
pub(super) fn resident_mib(pids: &[u32]) -> u64 {
    #[cfg(target_os = "linux")]
    let kib: u64 = pids.iter().filter_map(|pid| linux::resident(*pid)).sum();
    #[cfg(not(target_os = "linux"))]
    let kib = 0 * pids.len() as u64;
    kib / 1_024
}
