//! A lane's queue: bounded, fair between tenants, and short under overload.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use super::EngineError;
use super::shedding::Shedding;
use crate::domain::answer::Answer;
use crate::domain::id::TenantId;
use crate::domain::request::{Command, Origin};

/// A command that waits for its answer.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) command: Command,
    pub(super) origin: Origin,
    pub(super) deadline: Option<Instant>,
    pub(super) reply: oneshot::Sender<Result<Answer, EngineError>>,
    /// When it came.
    pub(super) put: Instant,
}

/// Why there was no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Full {
    /// A bound of the settings was reached.
    Queue,
    /// More comes than the lane can decide.
    Overloaded,
}

impl Full {
    /// Its name in the metrics.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Queue => "queue_full",
            Self::Overloaded => "overloaded",
        }
    }
}

#[derive(Debug, Default)]
struct Waiting {
    by_tenant: HashMap<TenantId, VecDeque<Job>>,
    /// Tenants with something waiting, the next one first.
    turns: VecDeque<TenantId>,
    total: usize,
    shedding: Shedding,
}

impl Waiting {
    /// Whether a new action has to stay outside. Each tenant keeps its share of the
    /// room, so that a busy one sheds its own load. What settles an action that was
    /// let in has the room that the settings give.
    fn sheds(&self, command: &Command, own: usize) -> bool {
        let Some(most) = self.shedding.most() else {
            return false;
        };
        let tenants = self.turns.len() + usize::from(own == 0);
        command.begins_action() && self.total >= most && own >= most / tenants.max(1)
    }
}

/// What waits for one lane. The lock is held for moments only, never across an
/// await, so a plain mutex serves.
#[derive(Debug)]
pub(super) struct Queue {
    waiting: Mutex<Waiting>,
    arrived: Notify,
    most: usize,
    most_per_tenant: usize,
}

impl Queue {
    pub(super) fn new(most: usize, most_per_tenant: usize) -> Self {
        Self {
            waiting: Mutex::default(),
            arrived: Notify::new(),
            most,
            most_per_tenant,
        }
    }

    /// Puts a job at the end of its tenant's line.
    pub(super) fn push(&self, tenant: &TenantId, job: Job) -> Result<(), Full> {
        {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            let waiting = &mut *waiting;
            let own = waiting.by_tenant.get(tenant).map_or(0, VecDeque::len);
            if waiting.total >= self.most || own >= self.most_per_tenant {
                return Err(Full::Queue);
            }
            if waiting.sheds(&job.command, own) {
                return Err(Full::Overloaded);
            }
            match waiting.by_tenant.get_mut(tenant) {
                Some(line) => line.push_back(job),
                None => {
                    waiting
                        .by_tenant
                        .insert(tenant.clone(), VecDeque::from([job]));
                    waiting.turns.push_back(tenant.clone());
                }
            }
            waiting.total += 1;
        }
        self.arrived.notify_one();
        Ok(())
    }

    /// How many jobs are waiting.
    pub(super) fn len(&self) -> usize {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.total
    }

    /// Waits until something is waiting.
    pub(super) async fn arrived(&self) {
        self.arrived.notified().await;
    }

    /// Takes what is waiting, at most `most` jobs. Tenants take turns by equal
    /// shares, so that a busy one keeps nobody waiting for more than a batch.
    pub(super) fn take(&self, most: usize) -> Vec<(TenantId, Job)> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = &mut *waiting;
        let mut taken = Vec::with_capacity(waiting.total.min(most));
        let share = (most / waiting.turns.len().max(1)).max(1);
        let mut visits = waiting.turns.len();
        while visits > 0 && taken.len() < most {
            visits -= 1;
            let Some(tenant) = waiting.turns.pop_front() else {
                break;
            };
            let Some(line) = waiting.by_tenant.get_mut(&tenant) else {
                continue;
            };
            let count = line.len().min(share).min(most - taken.len());
            taken.extend(line.drain(..count).map(|job| (tenant.clone(), job)));
            if line.is_empty() {
                waiting.by_tenant.remove(&tenant);
            } else {
                waiting.turns.push_back(tenant);
            }
        }
        waiting.total -= taken.len();
        let now = Instant::now();
        match taken.iter().map(|(_, job)| job.put).min() {
            Some(oldest) => waiting.shedding.taken(now, oldest, taken.len()),
            None => waiting.shedding.idle(now),
        }
        if waiting.total > 0 {
            self.arrived.notify_one();
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::domain::amount::Amounts;
    use crate::domain::request::{Action, Ask, Context, Decide};
    use crate::domain::scope::{Levels, Subject};

    fn job() -> Job {
        let id = crate::domain::id::ReservationId::parse("00000000-0000-8000-8000-000000000000");
        Job {
            command: Command::Expire(id.expect("an id")),
            origin: Origin {
                key: None,
                confinement: None,
                request_id: "".into(),
                trace_id: "".into(),
            },
            deadline: None,
            reply: oneshot::channel().0,
            put: Instant::now(),
        }
    }

    #[test]
    fn a_busy_tenant_leaves_the_others_their_share() {
        let queue = Queue::new(100, 100);
        let tenant = |name| TenantId::parse(name).expect("a tenant");
        for _ in 0..50 {
            queue.push(&tenant("busy"), job()).expect("room");
        }
        queue.push(&tenant("quiet"), job()).expect("room");
        let batch = queue.take(10);
        assert_eq!(
            batch.iter().filter(|(t, _)| *t == tenant("quiet")).count(),
            1
        );
        assert_eq!(batch.len(), 6, "half of the batch is the busy one's share");
    }

    #[test]
    fn a_full_queue_refuses_at_once() {
        let queue = Queue::new(3, 2);
        let tenant = |name| TenantId::parse(name).expect("a tenant");
        queue.push(&tenant("a"), job()).expect("room");
        queue.push(&tenant("a"), job()).expect("room");
        assert!(queue.push(&tenant("a"), job()).is_err(), "its own bound");
        queue.push(&tenant("b"), job()).expect("room");
        assert!(queue.push(&tenant("c"), job()).is_err(), "the lane's bound");
        assert_eq!(queue.take(10).len(), 3);
        queue.push(&tenant("c"), job()).expect("room again");
    }

    /// A new action of a tenant.
    fn decide(name: &str) -> Job {
        let tenant = TenantId::parse(name).expect("a tenant");
        let subject = Subject::new(tenant, Levels::default(), BTreeMap::new());
        let ask = Ask {
            subject: Arc::new(subject.expect("a subject")),
            action: Arc::new(Action {
                name: "act".into(),
                kind: None,
                arguments_sha256: None,
            }),
            estimates: Amounts::NONE,
            context: Context::default(),
            arguments: None,
            explain: false,
        };
        Job {
            command: Command::Decide(Box::new(Decide { ask, record: None })),
            ..job()
        }
    }

    #[tokio::test]
    async fn under_overload_a_busy_tenant_sheds_its_own_new_actions() {
        let queue = Queue::new(1_000, 1_000);
        let tenant = |name| TenantId::parse(name).expect("a tenant");
        let now = Instant::now() + Duration::from_secs(10);
        let late = now.checked_sub(Duration::from_secs(1)).expect("a time");
        {
            let mut waiting = queue.waiting.lock().expect("a queue");
            waiting.shedding.taken(now, late, 1);
            waiting
                .shedding
                .taken(now + Duration::from_secs(1), late, 1);
            assert_eq!(waiting.shedding.most(), Some(64));
        }
        let busy = std::iter::repeat_with(|| queue.push(&tenant("busy"), decide("busy")));
        assert_eq!(busy.take_while(Result::is_ok).count(), 64);
        for _ in 0..32 {
            let pushed = queue.push(&tenant("quiet"), decide("quiet"));
            assert_eq!(pushed, Ok(()), "half of the room is its own");
        }
        assert_eq!(
            queue.push(&tenant("quiet"), decide("quiet")),
            Err(Full::Overloaded)
        );
        assert_eq!(queue.push(&tenant("busy"), job()), Ok(()), "it settles");
    }
}
