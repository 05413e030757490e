//! `remit webhooks`: who is told of what happens, in the terminal.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Subcommand;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;

use crate::client::{self, Bearer, failed};
use crate::config::ClientArgs;
use crate::domain::event::EventType;
use crate::domain::id::Malformed;
use crate::proto;
use crate::proto::events_client::EventsClient;

#[derive(Debug, Subcommand)]
pub(crate) enum WebhooksCommand {
    /// Tells an address what happens from now on. Prints the secret, this once.
    Create(CreateArgs),
    /// Lists all with how far they are, and what failed.
    List(ListArgs),
    /// Delivers again what was given up, or everything from an entry on.
    Redeliver(RedeliverArgs),
    /// Ends one.
    Delete(OneArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct CreateArgs {
    #[command(flatten)]
    one: OneArgs,
    /// Where events go, for example `https://hooks.example/remit`.
    #[arg(long, value_name = "URL")]
    url: String,
    /// What of, for example `approval.requested,action.denied`. Default: everything.
    #[arg(long, value_delimiter = ',', value_parser = event_type, value_name = "TYPES")]
    events: Vec<EventType>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ListArgs {
    /// The tenant. Only needed with a key that belongs to none.
    #[arg(long, value_name = "TENANT")]
    tenant: Option<String>,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct RedeliverArgs {
    #[command(flatten)]
    one: OneArgs,
    /// The first entry, by its sequence. Default: only what was given up.
    #[arg(long, value_name = "SEQUENCE", default_value_t = 0)]
    from: i64,
}

#[derive(Debug, clap::Args)]
pub(crate) struct OneArgs {
    /// The subscription's name.
    subscription: String,
    /// The tenant. Only needed with a key that belongs to none.
    #[arg(long, value_name = "TENANT")]
    tenant: Option<String>,
    #[command(flatten)]
    client: ClientArgs,
}

fn event_type(text: &str) -> Result<EventType, String> {
    EventType::parse(text).map_err(|Malformed(wants)| format!("must be {wants}"))
}

type Events = EventsClient<InterceptedService<Channel, Bearer>>;

async fn connect(args: ClientArgs) -> anyhow::Result<Events> {
    let config = args.resolve()?;
    let key = config.api_key.as_ref();
    let key = key.context("an operator's key is needed: --key-file, or REMIT_API_KEY")?;
    let channel = client::connect(&config).await?;
    Ok(EventsClient::with_interceptor(channel, Bearer::new(key)?))
}

/// Runs one of the commands.
pub(crate) async fn run(command: WebhooksCommand) -> anyhow::Result<ExitCode> {
    match command {
        WebhooksCommand::Create(args) => create(args).await?,
        WebhooksCommand::List(args) => list(args).await?,
        WebhooksCommand::Redeliver(args) => redeliver(args).await?,
        WebhooksCommand::Delete(args) => delete(args).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn create(args: CreateArgs) -> anyhow::Result<()> {
    let types = match args.events.is_empty() {
        true => EventType::ALL.to_vec(),
        false => args.events,
    };
    let subscription = proto::Subscription {
        subscription_id: args.one.subscription,
        tenant: args.one.tenant.unwrap_or_default(),
        url: args.url,
        event_types: types
            .iter()
            .map(|of| proto::EventType::from(*of).into())
            .collect(),
        ..proto::Subscription::default()
    };
    let request = proto::CreateSubscriptionRequest {
        subscription: Some(subscription),
    };
    let mut events = connect(args.one.client).await?;
    let made = events.create_subscription(request).await.map_err(failed)?;
    println!("{}", made.into_inner().secret);
    Ok(())
}

async fn list(args: ListArgs) -> anyhow::Result<()> {
    let request = proto::ListSubscriptionsRequest {
        tenant: args.tenant.unwrap_or_default(),
    };
    let mut events = connect(args.client).await?;
    let listed = events.list_subscriptions(request).await.map_err(failed)?;
    let listed = listed.into_inner().subscriptions;
    if listed.is_empty() {
        println!("nothing");
    }
    for of in listed {
        println!(
            "{}  {}  entry {}, {} tried again, {} given up",
            of.subscription_id, of.url, of.delivered_sequence, of.retrying, of.dead
        );
        if !of.last_error.is_empty() {
            println!("    {}", of.last_error);
        }
    }
    Ok(())
}

async fn redeliver(args: RedeliverArgs) -> anyhow::Result<()> {
    let request = proto::RedeliverEventsRequest {
        subscription_id: args.one.subscription,
        tenant: args.one.tenant.unwrap_or_default(),
        from_sequence: args.from,
    };
    let mut events = connect(args.one.client).await?;
    let answer = events.redeliver_events(request).await.map_err(failed)?;
    println!(
        "{} that were given up are tried again",
        answer.into_inner().revived
    );
    Ok(())
}

async fn delete(args: OneArgs) -> anyhow::Result<()> {
    let request = proto::DeleteSubscriptionRequest {
        subscription_id: args.subscription,
        tenant: args.tenant.unwrap_or_default(),
    };
    let mut events = connect(args.client).await?;
    events.delete_subscription(request).await.map_err(failed)?;
    Ok(())
}
