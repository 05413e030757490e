//! kill -9 of the server and of PostgreSQL under load: nothing that was answered is
//! missing, nothing is counted twice.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use remit::proto::*;
use remit::store::embedded::owner_url_at;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tonic::Code;

use crate::contention::persist;
use crate::policy::provision;
use crate::support::*;

/// What clients were told: the points spent, by reservation.
type Told = Arc<Mutex<BTreeMap<String, i64>>>;

/// Reserves and commits until told to stop, at whichever address is current.
async fn client(address: Arc<RwLock<String>>, key: String, told: Told, stop: Arc<Mutex<bool>>) {
    let authority = || {
        let address = address.read().expect("not poisoned").clone();
        Client::new(&address, &key).authority
    };
    while !*stop.lock().expect("not poisoned") {
        let request = reserve(2);
        let held = persist(|| {
            let (mut client, request) = (authority(), request.clone());
            async move { client.reserve(request).await }
        })
        .await
        .into_inner();
        assert_eq!(held.decision(), Decision::Allow);
        let settle = commit(&held.reservation_id, points(1));
        persist(|| {
            let (mut client, settle) = (authority(), settle.clone());
            async move { client.commit(settle).await }
        })
        .await;
        let mut told = told.lock().expect("not poisoned");
        assert_eq!(
            told.insert(held.reservation_id, 1),
            None,
            "one key, one hold"
        );
    }
}

struct Load {
    address: Arc<RwLock<String>>,
    told: Told,
    stop: Arc<Mutex<bool>>,
    tasks: tokio::task::JoinSet<()>,
}

impl Load {
    fn start(world: &World) -> Self {
        let address = Arc::new(RwLock::new(world.server.address.clone()));
        let (told, stop) = (Told::default(), Arc::new(Mutex::new(false)));
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let key = world.server.key.clone();
            tasks.spawn(client(address.clone(), key, told.clone(), stop.clone()));
        }
        Self {
            address,
            told,
            stop,
            tasks,
        }
    }

    fn answered(&self) -> usize {
        self.told.lock().expect("not poisoned").len()
    }

    /// Waits until some more actions went through.
    async fn advance(&self, by: usize) {
        let (from, begun) = (self.answered(), Instant::now());
        while self.answered() < from + by {
            assert!(begun.elapsed() < Duration::from_secs(30), "no progress");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Ends the clients, then compares what they were told with what is stored.
    async fn finish(mut self, world: &World) -> usize {
        *self.stop.lock().expect("not poisoned") = true;
        while let Some(done) = self.tasks.join_next().await {
            done.expect("no client panics");
        }
        let answered = self.answered();
        let told = i64::try_from(answered).expect("a count");
        let committed = "SELECT count(*) FROM reservations WHERE state = 'COMMITTED'";
        assert_eq!(
            world.database.count(committed).await,
            told,
            "none missing, none twice"
        );
        let spent = "SELECT spent FROM balances WHERE tenant_id = 'acme'";
        assert_eq!(world.database.count(spent).await, told);
        let reserved = "SELECT reserved FROM balances WHERE tenant_id = 'acme'";
        assert_eq!(world.database.count(reserved).await, 0);
        world.database.assert_intact();
        answered
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_kills_of_the_server_lose_and_double_nothing() {
    let mut world =
        World::with_budgets(vec![budget("tenant:acme", Unit::RiskPoints, 1_000_000)]).await;
    let load = Load::start(&world);
    for _ in 0..20 {
        load.advance(15).await;
        world.server.kill();
        world.server.restart(&world.database).await;
        *load.address.write().expect("not poisoned") = world.server.address.clone();
    }
    load.advance(15).await;
    let answered = load.finish(&world).await;
    println!("{answered} actions through 20 kills of the server");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_kills_of_postgresql_lose_and_double_nothing() {
    let world = World::with_budgets(vec![budget("tenant:acme", Unit::RiskPoints, 1_000_000)]).await;
    let load = Load::start(&world);
    for _ in 0..20 {
        load.advance(15).await;
        // One that ends sooner after its start counts as failing, and ten of those
        // in a minute are given up.
        tokio::time::sleep(Duration::from_millis(1_200)).await;
        let pid = world.database.postmaster().expect("a running server");
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("a process to kill");
        // Backends outlive their server for a moment: only its successor counts.
        let begun = Instant::now();
        while world
            .database
            .postmaster()
            .is_none_or(|successor| successor == pid)
        {
            assert!(
                begun.elapsed() < Duration::from_secs(60),
                "it is started again"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    load.advance(15).await;
    let answered = load.finish(&world).await;
    println!("{answered} actions through 20 kills of PostgreSQL");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_its_database_the_server_says_so_and_recovers_by_itself() {
    let world = World::with_budgets(vec![budget("tenant:acme", Unit::RiskPoints, 100)]).await;
    let mut authority = world.operator.clone().authority;
    authority.reserve(reserve(1)).await.expect("an answer");
    let World {
        server, database, ..
    } = world;
    let Database { embedded, folder } = database;
    embedded.stop().await.expect("PostgreSQL stops");

    let begun = Instant::now();
    let mut request = tonic::Request::new(reserve(1));
    request.set_timeout(Duration::from_secs(8));
    let status = authority.reserve(request).await.expect_err("no database");
    assert_eq!(status.code(), Code::Unavailable);
    assert!(
        begun.elapsed() < Duration::from_secs(8),
        "within the deadline"
    );
    reason(&status);
    let target = format!("http://{}", server.address);
    let mut ready = true;
    for _ in 0..100 {
        ready = remit(&["healthcheck", "--target", &target])
            .status
            .success();
        if !ready {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(!ready, "not ready without a database");

    let embedded =
        remit::store::embedded::Embedded::start(remit::store::embedded::EmbeddedOptions {
            data_dir: folder.path().join("data"),
            postgres_bin: None,
        });
    let database = Database {
        embedded: embedded.await.expect("PostgreSQL starts"),
        folder,
    };
    let answer = persist(|| {
        let mut client = authority.clone();
        async move { client.reserve(reserve(1)).await }
    });
    assert_eq!(verdict(&answer.await.into_inner()), "ALLOW");
    database.assert_intact();
}

/// Where a connection to the database is cut.
#[derive(Clone, Copy)]
enum Cut {
    /// Before a statement reaches it.
    Before(&'static str),
    /// After a statement was carried out, before anybody hears of it.
    After(&'static str),
}

/// Stands between a server and PostgreSQL.
struct Wire {
    folder: tempfile::TempDir,
    /// What is still to be cut, the next one first.
    cuts: Arc<Mutex<VecDeque<Cut>>>,
}

impl Wire {
    fn to(database: &Database) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = ".s.PGSQL.5432";
        let listener = UnixListener::bind(folder.path().join(socket)).expect("a socket");
        let there = database.embedded.socket_dir().join(socket);
        let cuts = Arc::new(Mutex::new(VecDeque::new()));
        let next = cuts.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = UnixStream::connect(&there).await.expect("PostgreSQL");
                tokio::spawn(carry(client, server, next.clone()));
            }
        });
        Self { folder, cuts }
    }

    fn cut(&self, cuts: impl IntoIterator<Item = Cut>) {
        self.cuts.lock().expect("not poisoned").extend(cuts);
    }

    fn left(&self) -> usize {
        self.cuts.lock().expect("not poisoned").len()
    }
}

/// Carries bytes until one end closes or the next cut is reached.
async fn carry(mut client: UnixStream, mut server: UnixStream, cuts: Arc<Mutex<VecDeque<Cut>>>) {
    // PostgreSQL is done with what it was asked, outside of a transaction.
    const DONE: &[u8] = &[b'Z', 0, 0, 0, 5, b'I'];
    let says = |bytes: &[u8], text: &str| bytes.windows(text.len()).any(|at| at == text.as_bytes());
    let (mut asked, mut said) = (vec![0; 65_536], vec![0; 65_536]);
    // The statement is prepared first: it is carried out with what is asked next.
    let (mut prepared, mut carried_out) = (false, false);
    loop {
        tokio::select! {
            read = client.read(&mut asked) => {
                let Ok(1..) = read else { return };
                let bytes = &asked[..read.expect("bytes")];
                carried_out |= prepared;
                let reached = {
                    let mut cuts = cuts.lock().expect("not poisoned");
                    let text = match cuts.front() {
                        Some(Cut::Before(text) | Cut::After(text)) => *text,
                        None => "nothing is cut any more",
                    };
                    if says(bytes, text) { cuts.pop_front() } else { None }
                };
                match reached {
                    Some(Cut::Before(_)) => return,
                    Some(Cut::After(_)) => prepared = true,
                    None => {}
                }
                server.write_all(bytes).await.expect("PostgreSQL");
            }
            read = server.read(&mut said) => {
                let Ok(1..) = read else { return };
                let bytes = &said[..read.expect("bytes")];
                if !carried_out {
                    if client.write_all(bytes).await.is_err() {
                        return;
                    }
                } else if bytes.ends_with(DONE) {
                    return;
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_denial_is_recorded_once_though_two_connections_in_a_row_are_lost() {
    let world = World::with_budgets(vec![budget("tenant:acme", Unit::RiskPoints, 10)]).await;
    let wire = Wire::to(&world.database);
    let url = owner_url_at(wire.folder.path());
    let server = Server::start_at(&world.database, &url, &[]).await;
    let mut authority = server.operator().authority;
    // The write is committed and nobody hears of it; then finding out about it fails.
    wire.cut([
        Cut::After("/* write_batch */"),
        Cut::Before("/* standing */"),
    ]);
    let denied = authority.reserve(reserve(11)).await.expect("an answer");
    assert_eq!(verdict(&denied.into_inner()), "BUDGET_EXCEEDED");
    assert_eq!(wire.left(), 0, "both were cut");
    let recorded = "SELECT count(*) FROM ledger WHERE decision = 'DENY'";
    assert_eq!(world.database.count(recorded).await, 1);
    world.database.assert_intact();
}

/// A hold of some seconds without grace.
fn brief(tenant: &str, seconds: i64) -> ReserveRequest {
    let duration = |seconds| Some(pbjson_types::Duration { seconds, nanos: 0 });
    ReserveRequest {
        subject: Some(subject(tenant)),
        ttl: duration(seconds),
        grace: duration(0),
        ..reserve(1)
    }
}

/// Waits until a count is what it shall be.
async fn becomes(database: &Database, query: &'static str, wanted: i64) {
    let begun = Instant::now();
    loop {
        let is = database.count(query).await;
        if is == wanted {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "{query}: {is}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

const OPEN: &str = "SELECT count(*) FROM reservations WHERE state = 'ACTIVE'";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_whose_clock_is_ahead_ends_no_lease_and_is_not_ready() {
    let world = World::with_budgets(vec![budget("tenant:acme", Unit::RiskPoints, 100)]).await;
    let World {
        mut server,
        database,
        operator,
    } = world;
    let held = operator.clone().authority.reserve(brief("acme", 1)).await;
    held.expect("an answer");
    server.kill();
    // To new connections the database's clock is an hour behind.
    database
        .sql(
            "CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE
             AS $$SELECT pg_catalog.clock_timestamp() - interval '1 hour'$$;
             ALTER DATABASE remit SET search_path = public, pg_catalog",
        )
        .await;
    let server = Server::start(&database).await;
    let target = format!("http://{}", server.address);
    let ready = || {
        let asked = remit(&["healthcheck", "--target", &target]);
        asked.status.success()
    };
    for _ in 0..10 {
        assert!(!ready(), "its clock is not the database's");
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    assert_eq!(database.count(OPEN).await, 1, "it may live by other clocks");
    database
        .sql(
            "CREATE OR REPLACE FUNCTION public.clock_timestamp() RETURNS timestamptz
             LANGUAGE sql VOLATILE AS 'SELECT pg_catalog.clock_timestamp()'",
        )
        .await;
    becomes(&database, OPEN, 0).await;
    let begun = Instant::now();
    while !ready() {
        assert!(
            begun.elapsed() < Duration::from_secs(30),
            "it is ready then"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    database.assert_intact();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_wrong_clock_said_was_swept_is_swept() {
    let mut world = World::with_budgets(vec![budget("tenant:acme", Unit::RiskPoints, 100)]).await;
    let mut authority = world.operator.clone().authority;
    authority
        .reserve(brief("acme", 2))
        .await
        .expect("an answer");
    world.server.kill();
    world
        .database
        .sql(
            "INSERT INTO sweeps VALUES ('lapsed', 4000000000000000)
             ON CONFLICT (name) DO UPDATE SET until_us = excluded.until_us",
        )
        .await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    world.server.restart(&world.database).await;
    becomes(&world.database, OPEN, 0).await;
    let wrong = "SELECT count(*) FROM sweeps WHERE until_us >= 4000000000000000";
    becomes(&world.database, wrong, 0).await;
    world.database.assert_intact();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_expired_keeps_nobody_elses_waiting() {
    /// More than is looked at at once.
    const MANY: i64 = 600;

    let mut world = World::with_budgets(vec![budget("tenant:acme", Unit::RiskPoints, 100)]).await;
    let broken = "
tenants: [{tenant: broken}]
budgets: [{scope: 'tenant:broken', unit: UNIT_RISK_POINTS, allocation: 10000}]
policies: [{tenant: broken, rules: [{id: often, when: 'recent.denials > 1000', effect: RULE_EFFECT_DENY}]}]
";
    provision(&world.operator, broken).await.expect("a plan");
    let mut asked = tokio::task::JoinSet::new();
    for _ in 0..MANY {
        let mut authority = world.operator.clone().authority;
        asked.spawn(async move { authority.reserve(brief("broken", 10)).await });
    }
    while let Some(held) = asked.join_next().await {
        held.expect("no panic").expect("an answer");
    }
    let mut authority = world.operator.clone().authority;
    authority
        .reserve(brief("acme", 10))
        .await
        .expect("an answer");
    world.server.kill();
    world
        .database
        .sql("UPDATE documents SET body = replace(body, '> 1000', '> ') WHERE tenant_id = 'broken'")
        .await;
    world.server.restart(&world.database).await;
    becomes(&world.database, OPEN, MANY).await;
    let broken = "SELECT count(*) FROM reservations
                  WHERE state = 'ACTIVE' AND tenant_id = 'broken'";
    assert_eq!(world.database.count(broken).await, MANY);
    world
        .database
        .sql("UPDATE documents SET body = replace(body, '> ', '> 1000') WHERE tenant_id = 'broken'")
        .await;
    becomes(&world.database, OPEN, 0).await;
    world.database.assert_intact();
}
