//! The figures of one measurement, as a row of a table and as JSON.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::load::{Load, Tally};

/// Where rows go as they come.
pub(super) struct Printer {
    pub(super) json: bool,
}

impl Printer {
    pub(super) fn heading(&self) {
        if !self.json {
            println!("{}", Row::heading());
        }
    }

    pub(super) fn row(&self, row: &Row) -> anyhow::Result<()> {
        if self.json {
            println!("{}", serde_json::to_string(row)?);
        } else {
            println!("{}", row.line());
        }
        Ok(())
    }

    pub(super) fn say(&self, text: &str) {
        if self.json {
            eprintln!("{text}");
        } else {
            println!("{text}");
        }
    }
}

/// Latencies in milliseconds.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(super) struct Latency {
    pub(super) count: u64,
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
    pub(super) p999: f64,
    pub(super) max: f64,
}

impl Latency {
    pub(super) fn of(histogram: &Histogram<u64>) -> Self {
        let at = |quantile| milliseconds(histogram.value_at_quantile(quantile));
        Self {
            count: histogram.len(),
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: milliseconds(histogram.max()),
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "microseconds of minutes")]
fn milliseconds(micros: u64) -> f64 {
    micros as f64 / 1_000.0
}

/// One measurement.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Row {
    /// What was measured.
    pub(super) what: String,
    pub(super) clients: usize,
    pub(super) tenants: usize,
    /// Units of work a second: reserve and settle, or one decide.
    pub(super) pairs_per_second: f64,
    /// By RPC, and refusals.
    pub(super) latency_ms: BTreeMap<String, Latency>,
    /// Seconds of processor time in the measured time.
    pub(super) cpu_server: f64,
    pub(super) cpu_postgres: f64,
    pub(super) cpu_load: f64,
    /// By everything else on the machine.
    pub(super) cpu_others: f64,
    /// Of server, PostgreSQL and load, in microseconds.
    pub(super) cpu_us_per_pair: f64,
    /// Of the servers.
    pub(super) resident_mib: u64,
    /// Commands of a batch.
    pub(super) average_batch: f64,
    /// Attempts at a batch that were thrown away.
    pub(super) redone: u64,
    /// With a rate: pairs that were not even sent.
    pub(super) unsent: u64,
}

impl Row {
    /// What callers saw. Fails where one of them got an answer that load does not
    /// explain.
    #[expect(clippy::cast_precision_loss, reason = "counts of minutes")]
    pub(super) fn of(
        what: String,
        load: &Load,
        tenants: usize,
        took: Duration,
        tally: &Tally,
    ) -> anyhow::Result<Self> {
        if let Some(error) = &tally.first_error {
            anyhow::bail!("{what}: {} calls failed, first: {error}", tally.errors);
        }
        let latencies = tally.latency.iter();
        Ok(Self {
            what,
            clients: load.clients,
            tenants,
            pairs_per_second: tally.pairs as f64 / took.as_secs_f64(),
            latency_ms: latencies
                .map(|(rpc, latency)| ((*rpc).to_owned(), Latency::of(latency)))
                .collect(),
            unsent: tally.unsent,
            ..Self::default()
        })
    }

    /// The slowest RPC's latencies at each quantile: what a caller has to expect.
    pub(super) fn worst(&self) -> Latency {
        let rpcs = self
            .latency_ms
            .iter()
            .filter(|(rpc, _)| *rpc != super::load::REFUSED)
            .map(|(_, latency)| latency);
        rpcs.fold(Latency::default(), |worst, latency| Latency {
            count: worst.count + latency.count,
            p50: worst.p50.max(latency.p50),
            p90: worst.p90.max(latency.p90),
            p99: worst.p99.max(latency.p99),
            p999: worst.p999.max(latency.p999),
            max: worst.max.max(latency.max),
        })
    }

    /// The row whose throughput is in the middle.
    pub(super) fn median(mut rows: Vec<Self>) -> Option<Self> {
        rows.sort_by(|a, b| a.pairs_per_second.total_cmp(&b.pairs_per_second));
        let middle = rows.len().checked_sub(1)? / 2;
        Some(rows.swap_remove(middle))
    }

    /// The heading of [`Row::line`], for a terminal and for a document.
    pub(super) fn heading() -> &'static str {
        "| what | pairs/s | p50 | p90 | p99 | p99.9 | max ms | CPU s server | PostgreSQL | load | others | µs/pair | MiB | batch | redone |\n\
         |---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    }

    pub(super) fn line(&self) -> String {
        let l = self.worst();
        format!(
            "| {} | {:.0} | {:.2} | {:.2} | {:.2} | {:.1} | {:.0} | {:.1} | {:.1} | {:.1} | {:.1} | {:.0} | {} | {:.1} | {} |",
            self.what,
            self.pairs_per_second,
            l.p50,
            l.p90,
            l.p99,
            l.p999,
            l.max,
            self.cpu_server,
            self.cpu_postgres,
            self.cpu_load,
            self.cpu_others,
            self.cpu_us_per_pair,
            self.resident_mib,
            self.average_batch,
            self.redone,
        )
    }

    /// One line for each RPC.
    pub(super) fn details(&self) -> String {
        let mut text = String::new();
        for (rpc, l) in &self.latency_ms {
            text.push_str(&format!(
                "    {rpc:<8} {:>9} answers   p50 {:.2}  p90 {:.2}  p99 {:.2}  p99.9 {:.2}  max {:.1} ms\n",
                l.count, l.p50, l.p90, l.p99, l.p999, l.max
            ));
        }
        text
    }
}
