//! The pure core: what words mean and how a decision is made. No I/O, no clock,
//! no randomness: state, request and time come in, an answer and the changes
//! come out.
//!
//! Read in this order: [`scope`] and [`amount`] (what is counted where),
//! [`budget`] and [`reservation`] (what is kept), [`request`] (what is asked),
//! [`catalogue`], [`narrowing`] and [`policy`] (what an action is, and what beside
//! budgets decides on it), [`state`] (one tenant, and the commands that it takes),
//! [`ladder`] and [`decide`], [`approve`], [`settle`], `extend`, `record` and [`fund`]
//! (what comes after), [`provision`] (the operator's document), [`ledger`] (what is
//! written down), [`verify`] and [`replay`].

pub mod activity;
pub mod amount;
pub mod answer;
pub mod approve;
pub mod budget;
pub mod caps;
pub mod catalogue;
pub mod decide;
pub mod event;
mod extend;
pub mod fund;
pub mod id;
pub mod key;
pub mod ladder;
pub mod ledger;
mod line;
pub mod narrowing;
pub mod period;
pub mod permission;
pub mod policy;
pub mod provision;
pub mod query;
mod record;
pub mod refusal;
pub mod replay;
pub mod request;
pub mod reservation;
pub mod scope;
pub mod settle;
pub mod state;
pub mod subscription;
pub mod tenant;
pub mod time;
pub mod verify;
