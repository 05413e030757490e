//! `remit approvals`: what waits for a person, in the terminal.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Subcommand;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;

use crate::client::{self, Bearer, failed};
use crate::config::{ClientArgs, ClientConfig};
use crate::proto;
use crate::proto::approvals_client::ApprovalsClient;
use crate::proto::resolve_approval_request::Resolution;

#[derive(Debug, Subcommand)]
pub(crate) enum ApprovalsCommand {
    /// Lists what waits, the most urgent first.
    List(ListArgs),
    /// Shows one with all that is needed to decide.
    Show(OneArgs),
    /// Lets it pass.
    Approve(DecideArgs),
    /// Refuses it.
    Reject(DecideArgs),
    /// Prints what waits, then each as it is asked for or ends.
    Watch(WatchArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct ListArgs {
    /// The tenant. Only needed with a key that belongs to none.
    #[arg(long, value_name = "TENANT")]
    tenant: Option<String>,
    /// Only those that this key may decide.
    #[arg(long)]
    mine: bool,
    /// In place of what waits: approved, rejected, expired or withdrawn ones.
    #[arg(long, value_enum)]
    state: Option<State>,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum State {
    Approved,
    Rejected,
    Expired,
    Withdrawn,
}

#[derive(Debug, clap::Args)]
pub(crate) struct OneArgs {
    /// The approval's id, or as much of its beginning as makes it clear.
    approval: String,
    /// The tenant. Only needed with a key that belongs to none.
    #[arg(long, value_name = "TENANT")]
    tenant: Option<String>,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct DecideArgs {
    #[command(flatten)]
    one: OneArgs,
    /// Why, for the record.
    #[arg(short = 'm', long, default_value = "")]
    note: String,
    /// Who decides, for the record.
    #[arg(long, env = "USER", default_value = "")]
    approver: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct WatchArgs {
    /// The tenant. Only needed with a key that belongs to none.
    #[arg(long, value_name = "TENANT")]
    tenant: Option<String>,
    #[command(flatten)]
    client: ClientArgs,
}

type Approvals = ApprovalsClient<InterceptedService<Channel, Bearer>>;

async fn connect(config: &ClientConfig) -> anyhow::Result<Approvals> {
    let key = config.api_key.as_ref();
    let key = key.context("an approver's key is needed: --key-file, or REMIT_API_KEY")?;
    let channel = client::connect(config).await?;
    Ok(ApprovalsClient::with_interceptor(
        channel,
        Bearer::new(key)?,
    ))
}

/// Runs one of the commands.
pub(crate) async fn run(command: ApprovalsCommand) -> anyhow::Result<ExitCode> {
    match command {
        ApprovalsCommand::List(args) => list(args).await,
        ApprovalsCommand::Show(args) => show(args).await,
        ApprovalsCommand::Approve(args) => decide(args, Resolution::Approve(true)).await,
        ApprovalsCommand::Reject(args) => decide(args, Resolution::Reject(true)).await,
        ApprovalsCommand::Watch(args) => watch(args).await,
    }
}

async fn list(args: ListArgs) -> anyhow::Result<ExitCode> {
    let config = args.client.resolve()?;
    let state = match args.state {
        None => proto::ApprovalState::Pending,
        Some(State::Approved) => proto::ApprovalState::Approved,
        Some(State::Rejected) => proto::ApprovalState::Rejected,
        Some(State::Expired) => proto::ApprovalState::Expired,
        Some(State::Withdrawn) => proto::ApprovalState::Withdrawn,
    };
    let mut approvals = connect(&config).await?;
    let mut request = proto::ListApprovalsRequest {
        tenant: args.tenant.unwrap_or_default(),
        state: state.into(),
        mine: args.mine,
        page_size: 200,
        page_token: String::new(),
    };
    let mut count = 0;
    loop {
        let page = approvals
            .list_approvals(request.clone())
            .await
            .map_err(failed)?;
        let page = page.into_inner();
        page.approvals
            .iter()
            .for_each(|approval| println!("{}", line(approval)));
        count += page.approvals.len();
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    if count == 0 {
        println!("nothing");
    }
    Ok(ExitCode::SUCCESS)
}

/// The whole id of an approval of which the beginning was given.
async fn found(approvals: &mut Approvals, args: &OneArgs) -> anyhow::Result<String> {
    const WHOLE: usize = 36;

    if args.approval.len() >= WHOLE {
        return Ok(args.approval.clone());
    }
    let request = proto::ListApprovalsRequest {
        tenant: args.tenant.clone().unwrap_or_default(),
        page_size: 1_000,
        ..proto::ListApprovalsRequest::default()
    };
    let page = approvals
        .list_approvals(request)
        .await
        .map_err(failed)?
        .into_inner();
    let ids = page
        .approvals
        .into_iter()
        .map(|approval| approval.approval_id);
    let mut fitting: Vec<_> = ids.filter(|id| id.starts_with(&args.approval)).collect();
    match (fitting.pop(), fitting.is_empty()) {
        (Some(id), true) => Ok(id),
        (Some(_), false) => anyhow::bail!("{} begins more than one approval", args.approval),
        (None, _) => anyhow::bail!("nothing that waits begins with {}", args.approval),
    }
}

async fn show(args: OneArgs) -> anyhow::Result<ExitCode> {
    let config = args.client.clone().resolve()?;
    let mut approvals = connect(&config).await?;
    let request = proto::GetApprovalRequest {
        approval_id: found(&mut approvals, &args).await?,
        tenant: args.tenant.unwrap_or_default(),
    };
    let shown = approvals
        .get_approval(request)
        .await
        .map_err(failed)?
        .into_inner();
    let approval = shown.approval.context("the server sent no approval")?;
    print_whole(&approval);
    for balance in &shown.balances {
        let left = balance
            .remaining
            .map_or("no limit".to_owned(), |left| format!("{left} left"));
        println!(
            "budget      {} {}: {left}",
            balance.scope,
            word(balance.unit().as_str_name())
        );
    }
    for reservation in &shown.earlier {
        let action = reservation
            .action
            .as_ref()
            .map_or("", |action| &action.name);
        let at = reservation
            .create_time
            .as_ref()
            .map_or_else(String::new, moment);
        println!(
            "earlier     {at} {action}: {}",
            word(reservation.state().as_str_name())
        );
    }
    Ok(ExitCode::SUCCESS)
}

async fn decide(args: DecideArgs, resolution: Resolution) -> anyhow::Result<ExitCode> {
    let config = args.one.client.clone().resolve()?;
    let mut approvals = connect(&config).await?;
    let request = proto::ResolveApprovalRequest {
        idempotency_key: uuid::Uuid::now_v7().to_string(),
        approval_id: found(&mut approvals, &args.one).await?,
        resolution: Some(resolution),
        approver: args.approver,
        note: args.note,
        tenant: args.one.tenant.unwrap_or_default(),
    };
    let answer = approvals
        .resolve_approval(request)
        .await
        .map_err(failed)?
        .into_inner();
    let approval = answer.approval.context("the server sent no approval")?;
    println!("{}", line(&approval));
    Ok(ExitCode::SUCCESS)
}

async fn watch(args: WatchArgs) -> anyhow::Result<ExitCode> {
    let config = args.client.resolve()?;
    let mut approvals = connect(&config).await?;
    let request = proto::WatchApprovalsRequest {
        tenant: args.tenant.unwrap_or_default(),
    };
    let mut stream = approvals
        .watch_approvals(request)
        .await
        .map_err(failed)?
        .into_inner();
    while let Some(message) = stream.message().await.map_err(failed)? {
        if let Some(approval) = &message.approval {
            println!("{}", line(approval));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// An enum's name without what all of its values begin with.
fn word(name: &str) -> &str {
    [
        "APPROVAL_STATE_",
        "RESERVATION_STATE_",
        "UNIT_",
        "ACTION_LEVEL_",
    ]
    .into_iter()
    .find_map(|prefix| name.strip_prefix(prefix))
    .unwrap_or(name)
}

fn moment(at: &pbjson_types::Timestamp) -> String {
    let at = jiff::Timestamp::new(at.seconds, at.nanos).unwrap_or_default();
    at.strftime("%Y-%m-%d %H:%M:%SZ").to_string()
}

/// How long there is to decide.
fn left(approval: &proto::Approval) -> String {
    let until = approval.expire_time.as_ref().map_or(0, |at| at.seconds);
    match until - jiff::Timestamp::now().as_second() {
        seconds if seconds <= 0 => "over".to_owned(),
        seconds if seconds < 120 => format!("{seconds} s left"),
        seconds if seconds < 7_200 => format!("{} min left", seconds / 60),
        seconds if seconds < 172_800 => format!("{} h left", seconds / 3_600),
        seconds => format!("{} days left", seconds / 86_400),
    }
}

/// One approval on a line.
fn line(approval: &proto::Approval) -> String {
    let state = approval.state();
    let stands = match state {
        proto::ApprovalState::Pending => left(approval),
        _ if approval.approver.is_empty() => word(state.as_str_name()).to_lowercase(),
        _ => format!(
            "{} by {}",
            word(state.as_str_name()).to_lowercase(),
            approval.approver
        ),
    };
    let action = approval.action.as_ref().map_or("", |action| &action.name);
    let agent = approval
        .subject
        .as_ref()
        .map_or("", |subject| &subject.agent);
    let why = approval
        .reasons
        .first()
        .map_or("", |reason| &reason.message);
    format!(
        "{}  {stands:<14} {agent} {action}: {why}",
        approval.approval_id
    )
}

fn print_whole(approval: &proto::Approval) {
    let line = |label: &str, value: &str| {
        if !value.is_empty() {
            println!("{label:<11} {value}");
        }
    };
    line("approval", &approval.approval_id);
    let state = word(approval.state().as_str_name());
    line("state", &format!("{state}, {}", left(approval)));
    if let Some(action) = &approval.action {
        line("action", &action.name);
        if let Some(arguments) = &action.arguments {
            // Through a value, in which fields are in order.
            let value = serde_json::to_value(arguments).unwrap_or_default();
            let text = serde_json::to_string_pretty(&value).unwrap_or_default();
            text.lines().enumerate().for_each(|(at, text)| {
                line(if at == 0 { "arguments" } else { "" }, text);
            });
        }
    }
    if approval.arguments_incomplete {
        line("", "(not all of the arguments is kept)");
    }
    line("SHA-256", &approval.arguments_sha256);
    if let Some(subject) = &approval.subject {
        let levels = [
            ("workspace", &subject.workspace),
            ("app", &subject.app),
            ("workflow", &subject.workflow),
            ("agent", &subject.agent),
            ("toolset", &subject.toolset),
        ];
        let levels = levels.into_iter().filter(|(_, value)| !value.is_empty());
        let mut parts: Vec<_> = levels
            .map(|(key, value)| format!("{key}:{value}"))
            .collect();
        let mut dimensions: Vec<_> = subject.dimensions.iter().collect();
        dimensions.sort();
        parts.extend(
            dimensions
                .iter()
                .map(|(key, value)| format!("{key}:{value}")),
        );
        line("subject", &parts.join("/"));
    }
    if let Some(context) = &approval.context {
        line("where", &context.environment);
        line("for", &context.actor);
        line("why", &context.reason);
    }
    let amounts = approval.amounts.iter();
    let amounts = amounts.map(|a| format!("{} {}", a.value, word(a.unit().as_str_name())));
    line("amounts", &amounts.collect::<Vec<_>>().join(", "));
    for reason in &approval.reasons {
        line("asked since", &reason.message);
    }
    for set in &approval.approvers {
        line("approvers", &set.groups.join(" or "));
    }
    line("asked by", &format!("API key {}", approval.requested_by));
    line("approver", &approval.approver);
    line("note", &approval.note);
}
