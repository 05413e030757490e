//! Archives of the ledger's old months: a file of JSON lines for each, which verifies by
//! itself and with what is left in the database.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead as _, BufReader, BufWriter, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::domain::id::{Sequence, TenantId};
use crate::domain::time::Timestamp;
use crate::domain::verify::{Checkpoint, RawEntry, Verifier};
use crate::store::{Archivist, Month, Store};

const SUFFIX: &str = ".jsonl";

/// One entry, as it was stored.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    tenant: String,
    seq: i64,
    time_us: i64,
    kind: String,
    /// The bytes that were hashed.
    body: String,
    prev_hash: String,
    hash: String,
}

impl Line {
    fn of(tenant: &TenantId, entry: &RawEntry) -> Self {
        Self {
            tenant: tenant.as_str().to_owned(),
            seq: entry.seq.0,
            time_us: entry.time.as_micros(),
            kind: entry.kind.clone(),
            body: entry.text.clone(),
            prev_hash: hex::encode(&entry.prev_hash),
            hash: hex::encode(&entry.hash),
        }
    }

    fn entry(self) -> anyhow::Result<RawEntry> {
        Ok(RawEntry {
            seq: Sequence(self.seq),
            time: Timestamp::from_micros(self.time_us),
            kind: self.kind,
            found_by: None,
            text: self.body,
            prev_hash: hex::decode(self.prev_hash)?,
            hash: hex::decode(self.hash)?,
        })
    }
}

/// Archives every month before `before` into `folder`, oldest first: writes and verifies
/// it, then detaches it. What fails leaves the month where it was.
pub(crate) async fn archive(
    store: &Store,
    before: Month,
    folder: &Path,
    drop: bool,
) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    let mut archivist = store.archivist().await?;
    let strays = archivist.strays_before(before).await?;
    ensure!(
        strays == 0,
        "{strays} entries of that time are in ledger_default, which can't be archived by months"
    );
    let months = archivist.months_before(before).await?;
    if months.is_empty() {
        println!("nothing to archive");
    }
    for month in months {
        let file = folder.join(format!("{}{SUFFIX}", month.table()));
        let (entries, checkpoints) = write(&mut archivist, month, &file).await?;
        let detached = archivist.detach(month, &checkpoints, drop).await;
        detached.with_context(|| format!("detaching {}", month.table()))?;
        println!(
            "{}: {entries} entries of {} chains in {}, {}",
            month.table(),
            checkpoints.len(),
            file.display(),
            if drop {
                "dropped"
            } else {
                "detached: drop the table once the file is safe"
            }
        );
    }
    Ok(())
}

async fn write(
    archivist: &mut Archivist,
    month: Month,
    file: &Path,
) -> anyhow::Result<(u64, BTreeMap<TenantId, Checkpoint>)> {
    ensure!(!file.exists(), "{} exists already", file.display());
    let unfinished = file.with_extension("unfinished");
    let context = || format!("writing {}", unfinished.display());
    let mut out = BufWriter::new(File::create(&unfinished).with_context(context)?);
    let mut entries = 0;
    let mut checkpoints = BTreeMap::new();
    for (tenant, checkpoint) in archivist.chains_in(month).await? {
        let mut verifier = match checkpoint {
            Some(checkpoint) => Verifier::resume(tenant.clone(), checkpoint),
            None => Verifier::new(tenant.clone()),
        };
        loop {
            let page = archivist.page(month, &tenant, verifier.tip().seq).await?;
            if page.is_empty() {
                break;
            }
            for entry in &page {
                if let Err(problem) = verifier.read(entry) {
                    bail!(
                        "{tenant} is BROKEN at entry {}: {}. Nothing of this month was archived",
                        entry.seq,
                        problem.text
                    );
                }
                serde_json::to_writer(&mut out, &Line::of(&tenant, entry))?;
                out.write_all(b"\n").with_context(context)?;
                entries += 1;
            }
        }
        checkpoints.insert(tenant, verifier.checkpoint());
    }
    let out = out.into_inner().map_err(|error| error.into_error());
    out.and_then(|out| out.sync_all()).with_context(context)?;
    std::fs::rename(&unfinished, file).with_context(context)?;
    let folder = file.parent().unwrap_or(Path::new("."));
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.with_context(context)?;
    Ok((entries, checkpoints))
}

/// Reads every archive of a folder, from the first entry of each chain on, and answers
/// where each chain ends there.
pub(crate) fn read(folder: &Path) -> anyhow::Result<BTreeMap<TenantId, Checkpoint>> {
    let context = || format!("reading {}", folder.display());
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .and_then(|files| files.map(|file| Ok(file?.path())).collect())
        .with_context(context)?;
    files.retain(|file| file.to_string_lossy().ends_with(SUFFIX));
    files.sort();
    let mut verifiers: BTreeMap<TenantId, Verifier> = BTreeMap::new();
    for file in files {
        let opened = File::open(&file).with_context(|| format!("reading {}", file.display()))?;
        for (at, line) in BufReader::new(opened).lines().enumerate() {
            let place = || format!("{}, line {}", file.display(), at + 1);
            let line: Line = serde_json::from_str(&line?).with_context(place)?;
            let tenant = TenantId::from_stored(&line.tenant).with_context(place)?;
            let entry = line.entry().with_context(place)?;
            let verifier = verifiers
                .entry(tenant.clone())
                .or_insert_with(|| Verifier::new(tenant.clone()));
            if let Err(problem) = verifier.read(&entry) {
                bail!(
                    "{}: {tenant} is BROKEN at entry {}: {}",
                    place(),
                    entry.seq,
                    problem.text
                );
            }
        }
    }
    let ends = verifiers.into_iter();
    Ok(ends.map(|(tenant, v)| (tenant, v.checkpoint())).collect())
}
