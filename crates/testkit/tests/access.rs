//! Who may call what: every public use case of the engine, called as nobody, from a foreign project, with too little, and
//! with exactly what it needs. A use case that is missing in the table fails the test.

mod seen;

use futures::future::BoxFuture;
use karst_agent::{ImagePart, OutputStream};
use karst_engine::{
    Context,
    backups::{
        create::CreateBackup,
        import::{ImportInstance, ImportVolume},
    },
    checkpoints::{CreateCheckpoint, backup::BeginBackup},
    compute::{
        copy::CopyInstance,
        create::CreateInstance,
        define::DefineMachine,
        disk_copy::{CopyDisk, CopyTarget},
        memory_files::{AfterDump, DumpMemory, SaveMemory},
        power::PowerRequest,
        run::MachineChange,
        update::UpdateInstance,
    },
    firewall::{UpdateAcl, UpdateAddressSet, UpdateForward},
    images::{ImageOptions, UpdateImage, publish::PublishImage, push::PushImage, remote::FetchImage},
    network::{CreateNetwork, UpdateNetwork, life::NetworkSides},
    recover::RecoverPool,
    secrets::{DefineSecret, SecretKey, SecretValue},
    snapshots::{Origin, change::UpdateSnapshot, create::CreateSnapshot},
    storage::CreatePool,
    tenancy::{
        UpdateProfile,
        tokens::NewApiToken,
        trust::{CertificateSettings, NewCertificate},
    },
    volumes::{content::WriteVolume, copy::CopyVolume, create::CreateVolume, update::UpdateVolume},
};
use karst_env::SeededEnv;
use karst_model::{
    Config, Error, ErrorKind, OperationId, PrincipalId, ProjectId, Result,
    access::{Grant, Identity, Principal, Role},
    device::Devices,
    guest::{ExecRequest, FileKind, FileWrite},
    instance::{InstanceKind, PowerAction},
    pool_life::PoolChange,
    secret::SecretUse,
    storage::{PoolKind, VolumeContent},
    trust::CertificateKind,
};
use karst_testkit::{
    World,
    scenarios::{container, lose, upload},
    servers::{OneImage, source},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::Duration,
};

/// What a use case needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    /// To see the project.
    View,
    /// To use instances of the project.
    Use,
    /// To edit what is in the project.
    Edit,
    /// To edit what is in the default project: bridges belong to the whole host.
    SharedEdit,
    /// To see the server. The lowest role may, also one in a single project.
    ServerView,
    /// To read figures of the project.
    Metrics,
    /// To see all of the server.
    ServerInspect,
    /// To edit the server or projects.
    ServerEdit,
    /// To see all of the server; what is there is hidden from others.
    ServerHidden,
    /// To edit the server; what is there is hidden from those who may not see it.
    ServerEditHidden,
    /// Nothing: what is shown with the call decides, and it is wrong here.
    Anybody,
    /// Answers only what the caller may see, to anybody: the table says why this is enough.
    Filtered,
}
use Need::*;

type Call = for<'a> fn(&'a Fixture, &'a Context, &'a str) -> BoxFuture<'a, Result<()>>;

struct Case {
    name: &'static str,
    need: Need,
    call: Call,
}

struct Fixture {
    w: World,
    /// A graceful stop in `here` that does not end.
    running: OperationId,
    here: ProjectId,
    other: ProjectId,
    shared: ProjectId,
    /// A volume of which the database knows nothing.
    forgotten: karst_model::VolumeId,
}

impl Fixture {
    /// That the host is simulated.
    fn warning(&self) -> uuid::Uuid {
        self.w.engine.warnings(&self.w.admin).unwrap()[0].id
    }
}

/// The project in which things are, and the one where the foreigner is at home.
const HERE: &str = "here";
const OTHER: &str = "other";

fn root_and_nic(w: &World) -> Devices {
    w.engine.profile(&w.admin, "default", "default").unwrap().devices.clone()
}

/// A pool and a custom volume that the host has and the database has lost.
async fn forget(w: &World) -> karst_model::VolumeId {
    let pool = CreatePool { name: "forgotten".into(), driver: "dir".into(), ..Default::default() };
    w.ended(w.engine.pool_create(&w.admin, pool).await.unwrap()).await;
    let pool = w.engine.pool(&w.admin, "forgotten").unwrap().id;
    let made = w.engine.volume_create(&w.admin, "default", "default", volume("forgotten")).await.unwrap();
    w.ended(made).await;
    let id = {
        let records = w.engine.inner().inventory.read();
        records.volumes.values().find(|v| v.name == "forgotten").map(|v| v.id).unwrap()
    };
    for lost in [pool.uuid(), id.uuid()] {
        lose(w, lost).await.unwrap();
    }
    id
}

async fn fixture(env: &SeededEnv) -> Fixture {
    let w = World::new(env).await.unwrap();
    w.engine.set_image_servers(std::sync::Arc::new(OneImage::default()));
    let (e, c) = (&w.engine, &w.admin);
    let forgotten = forget(&w).await;
    e.set_secret_key(SecretKey::new(&[7; 32]).unwrap());
    for p in [HERE, OTHER, "empty"] {
        e.project_create(c, p, "", Config::new()).await.unwrap();
    }
    let update = UpdateProfile { devices: root_and_nic(&w), ..Default::default() };
    e.profile_update(c, HERE, "default", update.clone()).await.unwrap();
    e.profile_create(c, HERE, "spare", update).await.unwrap();
    for (name, start) in [("run", true), ("still", false), ("stubborn", true)] {
        let request = CreateInstance { start, ..container(name) };
        let (_, operation) = e.instance_create(c, HERE, request).await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);
    }
    e.certificate_add(c, certificate('a'), settings("client")).await.unwrap();
    let robot = NewApiToken {
        name: "robot".into(),
        description: String::new(),
        role: Role::Viewer,
        projects: vec![],
        expires_at: None,
    };
    e.api_token_create(c, robot).await.unwrap();
    e.acl_create(c, "default", "used", UpdateAcl::default()).await.unwrap();
    let nic = [("type", "nic"), ("network", "karstbr0"), ("security.acls", "used")];
    let nic = nic.map(|(k, v)| (k.to_owned(), v.to_owned())).into_iter().collect();
    let mut walled = container("walled");
    walled.devices.insert("eth0".into(), nic);
    let (_, operation) = e.instance_create(c, HERE, walled).await.unwrap();
    assert_eq!(w.ended(operation).await.error, None);
    let options = ImageOptions::default();
    let build = e.image_build(c, HERE, "debian/12", InstanceKind::Container, options).await.unwrap();
    assert_eq!(w.ended(build).await.error, None);
    let (_, operation) = e.network_create(c, "default", CreateNetwork::automatic("net1")).await.unwrap();
    assert_eq!(w.ended(operation).await.error, None);
    e.acl_create(c, "default", "web", UpdateAcl::default()).await.unwrap();
    e.address_set_create(c, "default", "office", UpdateAddressSet::default()).await.unwrap();
    e.forward_create(c, "default", "net1", LISTEN, UpdateForward::default()).await.unwrap();
    let pool = CreatePool { name: "resting".into(), driver: "dir".into(), ..Default::default() };
    e.pool_define(c, pool).await.unwrap();
    let pool = CreatePool { name: "second".into(), driver: "dir".into(), ..Default::default() };
    let operation = e.pool_create(c, pool).await.unwrap();
    assert_eq!(w.ended(operation).await.error, None);
    let disk = CreateVolume { content: VolumeContent::Block, ..volume("blocks") };
    for request in [volume("data"), disk] {
        let operation = e.volume_create(c, HERE, "default", request).await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);
    }
    let request = CreateSnapshot { name: Some("snap".into()), ..CreateSnapshot::default() };
    let (_, backup) = e.backup_create(c, of_still(HERE), kept()).await.unwrap();
    assert_eq!(w.ended(backup).await.error, None);
    let operation = e.snapshot_create(c, of_still(HERE), request).await.unwrap();
    assert_eq!(w.ended(operation).await.error, None);
    let id = e.instance(c, HERE, "stubborn").unwrap().instance.id;
    w.agent.set_ignores_shutdown(id, true);
    let request = PowerRequest { action: PowerAction::Stop, force: false, timeout: None, stateful: false };
    let running = e.instance_power(c, HERE, "stubborn", request).await.unwrap().id();
    // The reconciler of warnings has looked.
    karst_env::Env::sleep(env, Duration::from_secs(3)).await;
    let of = |name: &str| e.project(c, name, karst_model::access::Permission::ProjectView).unwrap().id;
    e.secret_define(c, HERE, secret(SECRET, "v1")).await.unwrap();
    e.secret_set_value(c, HERE, SECRET, value()).await.unwrap();
    let (here, other, shared) = (of(HERE), of(OTHER), of("default"));
    Fixture { w, running, here, other, shared, forgotten }
}

/// A secret with a value.
const SECRET: uuid::Uuid = uuid::Uuid::from_u128(0x5ec2e7);

fn secret(uuid: uuid::Uuid, usage: &str) -> DefineSecret {
    let (kind, usage) = (SecretUse::Volume, usage.to_owned());
    let description = String::new();
    DefineSecret { uuid: Some(uuid), description, kind, usage, private: false, ephemeral: false }
}

fn value() -> SecretValue {
    SecretValue::new(b"open sesame".to_vec()).unwrap()
}

/// Where a forward of `net1` listens.
const LISTEN: &str = "192.0.2.50";

fn of_still(project: &str) -> Origin<'_> {
    Origin::Instance { project, name: "still" }
}

fn kept() -> CreateBackup {
    CreateBackup { name: Some("kept".into()), ..CreateBackup::default() }
}

fn data(project: &str) -> karst_engine::volumes::files::VolumeAt<'_> {
    karst_engine::volumes::files::VolumeAt { project, pool: "default", name: "data" }
}

fn link(path: &str) -> FileWrite {
    let (kind, target) = (FileKind::Symlink, Some("y".into()));
    FileWrite { path: path.into(), kind, uid: None, gid: None, mode: None, append: false, target }
}

/// `net1` is stopped.
async fn off(w: &World) -> Result<()> {
    if w.engine.network(&w.admin, "default", "net1")?.is_active() {
        let operation = w.engine.network_stop(&w.admin, "default", "net1").await?;
        assert_eq!(w.ended(operation).await.error, None);
    }
    Ok(())
}

fn net1(w: &World) -> Result<Config> {
    Ok(w.engine.network(&w.admin, "default", "net1")?.config.clone())
}

fn volume(name: &str) -> CreateVolume {
    let content = VolumeContent::Filesystem;
    CreateVolume { name: name.into(), content, description: String::new(), config: Config::new() }
}

fn who(role: Role, project: Option<ProjectId>) -> Context {
    Context::new(Principal {
        id: PrincipalId(uuid::Uuid::from_u128(4711)),
        identity: Identity::UnixPeer { uid: 1000, gid: 1000, pid: 1 },
        grants: vec![Grant { role, project }],
    })
}

fn pull() -> karst_engine::compute::disk_copy::merge::MergeDisk {
    use karst_engine::compute::disk_copy::merge::{MergeDisk, MergeLayers};
    MergeDisk { device: None, what: MergeLayers::Pull { base: None }, hold: false, speed: 0 }
}

/// Who may is told that the instance is a container.
fn of_a_machine(outcome: Result<()>) -> Result<()> {
    match outcome {
        Err(e) if e.kind == ErrorKind::Unsupported => Ok(()),
        other => other.and_then(|()| Err(Error::internal("a container took it", ""))),
    }
}

/// Who may is told that there is nothing to do it to.
fn nothing_is_copied(outcome: Result<()>) -> Result<()> {
    match outcome {
        Err(e) if e.kind == ErrorKind::Conflict => Ok(()),
        other => other.and_then(|()| Err(Error::internal("a copy that there is none of", ""))),
    }
}

/// Who may is told that there is none.
fn there_is_no_checkpoint(outcome: Result<()>) -> Result<()> {
    match outcome {
        Err(e) if e.kind == ErrorKind::NotFound && e.message.contains("checkpoint") => Ok(()),
        other => other.and_then(|()| Err(Error::internal("a checkpoint that there is none of", ""))),
    }
}

/// Who may is told that there is none.
fn there_is_no_file(outcome: Result<()>) -> Result<()> {
    match outcome {
        Err(e) if e.kind == ErrorKind::NotFound && e.message.contains("/srv/saves/a") => Ok(()),
        other => other.and_then(|()| Err(Error::internal("a file that there is none of", ""))),
    }
}

fn power(action: PowerAction) -> PowerRequest {
    PowerRequest { action, force: true, timeout: None, stateful: false }
}

fn certificate(digit: char) -> NewCertificate {
    NewCertificate { fingerprint: digit.to_string().repeat(64), pem: "pem".into() }
}

fn settings(name: &str) -> CertificateSettings {
    CertificateSettings {
        name: name.into(),
        description: String::new(),
        kind: CertificateKind::Client,
        restricted: false,
        projects: vec![],
    }
}

/// What a program printed that the administrator had run: its name.
async fn kept_output(f: &Fixture) -> String {
    let kept = f.w.engine.exec_output_keep(&f.w.admin, HERE, "run", f.running, OutputStream::Stdout).await;
    drop(kept.unwrap());
    OutputStream::Stdout.of(f.running)
}

fn exec() -> ExecRequest {
    ExecRequest {
        command: vec!["true".into()],
        environment: Default::default(),
        uid: 0,
        gid: 0,
        cwd: None,
        terminal: None,
        term: None,
    }
}

macro_rules! cases {
    ($( $name:ident $need:ident |$f:ident, $c:ident, $p:ident| $call:expr; )+) => {
        vec![$( Case {
            name: stringify!($name),
            need: $need,
            call: |$f, $c, $p| Box::pin(async move { let _ = $p; $call }),
        } ),+]
    };
}

#[rustfmt::skip]
fn cases() -> Vec<Case> {
    cases! {
        // The server.
        subscribe ServerView |f, c, p| f.w.engine.subscribe(c).map(drop);
        host_facts ServerView |f, c, p| f.w.engine.host_facts(c).map(drop);
        host_resources ServerView |f, c, p| f.w.engine.host_resources(c).await.map(drop);
        host_cpu_models ServerView |f, c, p| f.w.engine.host_cpu_models(c).await.map(drop);
        host_stop ServerEdit |f, c, p| f.w.engine.host_stop(c).await.map(drop);
        probe_host ServerInspect |f, c, p| f.w.engine.probe_host(c).await.map(drop);
        health ServerEdit |f, c, p| f.w.engine.health(c).await.map(drop);
        pools ServerView |f, c, p| f.w.engine.pools(c).map(drop);
        pool ServerView |f, c, p| f.w.engine.pool(c, "default").map(drop);
        pool_abilities ServerView |f, c, p| f.w.engine.pool_abilities(c, "default").await.map(drop);
        pool_usage ServerView |f, c, p| f.w.engine.pool_usage(c, "default").await.map(drop);
        pool_create ServerEdit |f, c, p| f.w.engine.pool_create(c, CreatePool { name: "third".into(), driver: "dir".into(), ..Default::default() }).await.map(drop);
        pool_define ServerEdit |f, c, p| f.w.engine.pool_define(c, CreatePool { name: "fourth".into(), driver: "dir".into(), ..Default::default() }).await;
        pool_change ServerEdit |f, c, p| f.w.engine.pool_change(c, "second", PoolChange::Stop).await.map(drop);
        pool_stop ServerEdit |f, c, p| f.w.engine.pool_stop(c, "second").await;
        pool_start ServerEdit |f, c, p| f.w.engine.pool_start(c, "resting").await;
        pool_forget ServerEdit |f, c, p| f.w.engine.pool_forget(c, "resting").await;
        pool_set_autostart ServerEdit |f, c, p| f.w.engine.pool_set_autostart(c, "second", false).await;
        pool_refresh ServerView |f, c, p| f.w.engine.pool_refresh(c, "default").await.map(drop);
        pool_sources ServerInspect |f, c, p| f.w.engine.pool_sources(c, PoolKind::Lvm).await.map(drop);
        pool_update ServerEdit |f, c, p| f.w.engine.pool_update(c, "default", Default::default()).await.map(drop);
        pool_delete ServerEdit |f, c, p| f.w.engine.pool_delete(c, "second").await.map(drop);
        operation_attend ServerEdit |f, c, p| f.w.engine.operation_attend(c, f.running, false).await;
        warnings Filtered |f, c, p| match f.w.engine.warnings(c) { Ok(all) => { assert!(all.is_empty() || c.principal().may(karst_model::access::Permission::ServerInspect, None), "{all:?}"); Ok(()) } Err(e) => { assert_eq!(e.kind, ErrorKind::Unauthenticated); Ok(()) } };
        warning ServerHidden |f, c, p| f.w.engine.warning(c, f.warning()).map(drop);
        warning_acknowledge ServerEditHidden |f, c, p| f.w.engine.warning_acknowledge(c, f.warning(), true).await;
        warning_delete ServerEditHidden |f, c, p| f.w.engine.warning_delete(c, f.warning()).await;
        audit Filtered |f, c, p| { f.w.engine.audit(c, Default::default()); Ok(()) };
        audit_asked Filtered |f, c, p| { drop(f.w.engine.audit_asked(c, "request PUT", "/1.0", "")); Ok(()) };
        audit_read ServerInspect |f, c, p| f.w.engine.audit_read(c, 1, 10).await.map(drop);
        audit_verify ServerInspect |f, c, p| f.w.engine.audit_verify(c).await.map(drop);
        metrics Metrics |f, c, p| f.w.engine.metrics(c, Some(p)).await.map(drop);
        // Who is trusted.
        certificates ServerView |f, c, p| { let all = f.w.engine.certificates(c)?; let inspects = c.principal().may(karst_model::access::Permission::ServerInspect, None); assert!(inspects || all.is_empty(), "those of others"); Ok(()) };
        certificate ServerHidden |f, c, p| f.w.engine.certificate(c, &"a".repeat(64)).map(drop);
        certificate_add ServerEdit |f, c, p| f.w.engine.certificate_add(c, certificate('b'), settings("new")).await;
        certificate_update ServerEdit |f, c, p| f.w.engine.certificate_update(c, &"a".repeat(64), settings("renamed"), None, None).await;
        certificate_delete ServerEditHidden |f, c, p| f.w.engine.certificate_delete(c, &"a".repeat(64)).await;
        trust_token_issue ServerEdit |f, c, p| f.w.engine.trust_token_issue(c, settings("friend")).await.map(drop);
        trust_token_redeem Anybody |f, c, p| f.w.engine.trust_token_redeem(c, "x", "wrong", certificate('c')).await;
        access ServerInspect |f, c, p| f.w.engine.access(c, Some(p)).map(drop);
        access_grant ServerEdit |f, c, p| f.w.engine.access_grant(c, "robot", Role::User, Some(p)).await;
        access_revoke ServerEdit |f, c, p| f.w.engine.access_revoke(c, "robot", Role::Viewer, None).await;
        access_why ServerInspect |f, c, p| f.w.engine.access_why(c, "robot", karst_model::access::Permission::InstanceUse, "project/here").map(drop);
        api_tokens ServerInspect |f, c, p| f.w.engine.api_tokens(c).map(drop);
        api_token_create ServerEdit |f, c, p| f.w.engine.api_token_create(c, NewApiToken { name: "fresh".into(), description: String::new(), role: Role::Viewer, projects: vec![], expires_at: None }).await.map(drop);
        api_token_delete ServerEdit |f, c, p| f.w.engine.api_token_delete(c, "robot").await;
        server_config ServerInspect |f, c, p| f.w.engine.server_config(c).map(drop);
        server_config_check ServerEdit |f, c, p| f.w.engine.server_config_check(c, &Config::new()).map(drop);
        server_config_update ServerEdit |f, c, p| f.w.engine.server_config_update(c, Config::new(), None).await;
        // Projects.
        projects Filtered |f, c, p| { assert!(f.w.engine.projects(c).iter().all(|x| c.principal().may(karst_model::access::Permission::ProjectView, Some(x.id)))); Ok(()) };
        project View |f, c, p| f.w.engine.project(c, p, karst_model::access::Permission::ProjectView).map(drop);
        project_state View |f, c, p| f.w.engine.project_state(c, p).map(drop);
        project_create ServerEdit |f, c, p| f.w.engine.project_create(c, "fresh", "", Config::new()).await;
        project_update ServerEdit |f, c, p| { let kept = f.w.engine.project(&f.w.admin, p, karst_model::access::Permission::ProjectView).map(|x| x.config.clone()).unwrap_or_default(); f.w.engine.project_update(c, p, "text", kept, None).await };
        project_rename ServerEdit |f, c, p| f.w.engine.project_rename(c, p, "renamed").await;
        project_delete ServerEdit |f, c, p| f.w.engine.project_delete(c, "empty").await;
        // Operations.
        operations View |f, c, p| f.w.engine.operations(c, Some(p)).map(drop);
        operation View |f, c, p| f.w.engine.operation(c, f.running).map(drop);
        live_operation View |f, c, p| f.w.engine.live_operation(c, f.running).map(drop);
        operation_wait View |f, c, p| f.w.engine.operation_wait(c, f.running, Some(Duration::from_millis(1))).await.map(drop);
        operation_cancel Edit |f, c, p| f.w.engine.operation_cancel(c, f.running).await;
        // Profiles.
        profiles View |f, c, p| f.w.engine.profiles(c, p).map(drop);
        profile View |f, c, p| f.w.engine.profile(c, p, "spare").map(drop);
        profile_create Edit |f, c, p| f.w.engine.profile_create(c, p, "fresh", UpdateProfile::default()).await;
        profile_update Edit |f, c, p| f.w.engine.profile_update(c, p, "spare", UpdateProfile::default()).await;
        profile_update_begin Edit |f, c, p| f.w.engine.profile_update_begin(c, p, "spare", UpdateProfile::default()).await.map(drop);
        profile_used_by Filtered |f, c, p| { let x = f.w.engine.profile(&f.w.admin, HERE, "default")?; demand_nothing_hidden(f, c, f.w.engine.profile_used_by(c, &x)) };
        profile_rename Edit |f, c, p| f.w.engine.profile_rename(c, p, "spare", "renamed").await;
        profile_delete Edit |f, c, p| f.w.engine.profile_delete(c, p, "spare").await;
        // Instances.
        instances View |f, c, p| f.w.engine.instances(c, p).map(drop);
        demand_architecture Filtered |f, c, p| match f.w.engine.demand_architecture(c, None, std::env::consts::ARCH) { Ok(()) => Ok(()), Err(e) => { assert_eq!(e.kind, ErrorKind::Unauthenticated); Ok(()) } };
        instances_all Filtered |f, c, p| { assert!(f.w.engine.instances_all(c).iter().all(|x| c.principal().may(karst_model::access::Permission::ProjectView, Some(x.project.id)))); Ok(()) };
        instance View |f, c, p| f.w.engine.instance(c, p, "run").map(drop);
        instance_metadata View |f, c, p| f.w.engine.instance_metadata(c, p, "still").map(drop);
        instance_metadata_update Edit |f, c, p| f.w.engine.instance_metadata_update(c, p, "still", Default::default(), None).await;
        instance_template View |f, c, p| match f.w.engine.instance_template(c, p, "still", "a.tpl") { Err(e) if e.message.starts_with("Template") => Ok(()), other => other.map(drop) };
        instance_template_write Edit |f, c, p| f.w.engine.instance_template_write(c, p, "still", "a.tpl", "x").await;
        instance_template_delete Edit |f, c, p| match f.w.engine.instance_template_delete(c, p, "still", "a.tpl").await { Err(e) if e.message.starts_with("Template") => Ok(()), other => other };
        instance_pending View |f, c, p| f.w.engine.instance_pending(c, p, "run").map(drop);
        instance_history View |f, c, p| f.w.engine.instance_history(c, p, "run").await.map(drop);
        instance_metrics View |f, c, p| f.w.engine.instance_metrics(c, p, "run").await.map(drop);
        instance_create Edit |f, c, p| f.w.engine.instance_create(c, p, container("fresh")).await.map(drop);
        instance_update Edit |f, c, p| f.w.engine.instance_update(c, p, "still", UpdateInstance { description: "x".into(), ephemeral: false, config: Config::new(), devices: Devices::new(), profiles: vec!["default".into()], if_version: None }).await.map(drop);
        instance_configure Edit |f, c, p| f.w.engine.instance_configure(c, p, "still", UpdateInstance { description: "x".into(), ephemeral: false, config: Config::new(), devices: Devices::new(), profiles: vec!["default".into()], if_version: None }).await.map(drop);
        instance_rename Edit |f, c, p| f.w.engine.instance_rename(c, p, "still", "renamed").await;
        instance_delete Edit |f, c, p| f.w.engine.instance_delete(c, p, "still").await.map(drop);
        machine_update Edit |f, c, p| f.w.engine.machine_update(c, p, "still", UpdateInstance { description: "x".into(), ephemeral: false, config: Config::new(), devices: Devices::new(), profiles: vec!["default".into()], if_version: None }, true, &BTreeMap::new()).await.map(drop);
        machine_change Edit |f, c, p| f.w.engine.machine_change(c, p, "still", MachineChange { definition: Some(UpdateInstance { description: "x".into(), ephemeral: false, config: Config::new(), devices: Devices::new(), profiles: vec!["default".into()], if_version: None }), ..Default::default() }).await.map(drop);
        instance_undefine Edit |f, c, p| f.w.engine.instance_undefine(c, p, "still").await.map(drop);
        machine_define Edit |f, c, p| f.w.engine.machine_define(c, p, DefineMachine { create: CreateInstance { kind: InstanceKind::VirtualMachine, ..container("fresh") }, uuid: None, places: BTreeMap::new(), paused: false, memory: None }).await.map(drop);
        instance_power Use |f, c, p| f.w.engine.instance_power(c, p, "run", power(PowerAction::Stop)).await.map(drop);
        instance_ask Use |f, c, p| f.w.engine.instance_ask(c, p, "run", karst_model::guest::GuestWish::Shutdown, karst_model::guest::AskedBy::Any).await;
        machine_start_fresh Use |f, c, p| of_a_machine(f.w.engine.machine_start_fresh(c, p, "still", false).await.map(drop));
        machine_start_paused Use |f, c, p| of_a_machine(f.w.engine.machine_start_paused(c, p, "still", false).await.map(drop));
        machine_save ServerEdit |f, c, p| of_a_machine(f.w.engine.machine_save(c, HERE, "run", SaveMemory { path: "/srv/saves/a".into(), document: String::new(), paused: None }).await.map(drop));
        machine_dump ServerEdit |f, c, p| of_a_machine(f.w.engine.machine_dump(c, HERE, "run", DumpMemory { path: "/srv/saves/a".into(), format: karst_model::memory::DumpFormat::Elf, after: AfterDump::GoesOn }).await.map(drop));
        machine_memory ServerEdit |f, c, p| of_a_machine(f.w.engine.machine_memory(c, p, "run", karst_model::memory::DumpFormat::Elf).await.map(drop));
        machine_restore ServerEdit |f, c, p| of_a_machine(f.w.engine.machine_restore(c, HERE, "still", "/srv/saves/a", false).await.map(drop));
        memory_writing View |f, c, p| { let found = f.w.engine.memory_writing(c, p, "run").await?; assert!(found.is_none(), "nothing is written"); Ok(()) };
        memory_writing_abort Use |f, c, p| nothing_is_copied(f.w.engine.memory_writing_abort(c, p, "run").await);
        memory_file ServerEdit |f, c, p| there_is_no_file(f.w.engine.memory_file(c, "/srv/saves/a").await.map(drop));
        memory_file_change ServerEdit |f, c, p| there_is_no_file(f.w.engine.memory_file_change(c, "/srv/saves/a", uuid::Uuid::nil(), String::new(), false).await);
        instance_memory_drop Use |f, c, p| f.w.engine.instance_memory_drop(c, p, "still").await.map(drop);
        exec_check Use |f, c, p| f.w.engine.exec_check(c, p, "run", &exec()).map(drop);
        exec Use |f, c, p| f.w.engine.exec(c, p, "run", exec()).await.map(drop);
        exec_output_keep Use |f, c, p| f.w.engine.exec_output_keep(c, p, "run", f.running, OutputStream::Stdout).await.map(drop);
        exec_outputs Use |f, c, p| f.w.engine.exec_outputs(c, p, "run").await.map(drop);
        exec_output Use |f, c, p| { let name = kept_output(f).await; f.w.engine.exec_output(c, p, "run", &name).await.map(drop) };
        exec_output_delete Use |f, c, p| { let name = kept_output(f).await; f.w.engine.exec_output_delete(c, p, "run", &name).await };
        console Use |f, c, p| f.w.engine.console(c, p, "run", false).await.map(drop);
        machine_port Use |f, c, p| of_a_machine(f.w.engine.machine_port(c, p, "run", "serial1", false).await.map(drop));
        console_log Use |f, c, p| f.w.engine.console_log(c, p, "run", false).await.map(drop);
        console_log Edit |f, c, p| f.w.engine.console_log(c, p, "run", true).await.map(drop);
        instance_log Use |f, c, p| f.w.engine.instance_log(c, p, "run", false).await.map(drop);
        instance_log Edit |f, c, p| f.w.engine.instance_log(c, p, "run", true).await.map(drop);
        machine_reset Use |f, c, p| of_a_machine(f.w.engine.machine_reset(c, p, "run").await);
        machine_keys Use |f, c, p| of_a_machine(f.w.engine.machine_keys(c, p, "run", &["a".into()]).await);
        machine_screenshot Use |f, c, p| of_a_machine(f.w.engine.machine_screenshot(c, p, "run").await.map(drop));
        machine_display Use |f, c, p| of_a_machine(f.w.engine.machine_display(c, p, "run", karst_model::display::DisplayProtocol::Spice, true).await.map(drop));
        display_state View |f, c, p| f.w.engine.display_state(c, p, "run").map(drop);
        display_password Edit |f, c, p| f.w.engine.display_password(c, p, "run").map(drop);
        display_passwords_kept Edit |f, c, p| f.w.engine.display_passwords_kept(c, p);
        display_password_set Edit |f, c, p| of_a_machine(f.w.engine.display_password_set(c, p, "run", None).await);
        machine_figures View |f, c, p| { let found = f.w.engine.machine_figures(c, p, "run").await?; assert!(found.is_none(), "it is a container"); Ok(()) };
        guest_agent Use |f, c, p| of_a_machine(f.w.engine.guest_agent(c, p, "run", ("guest-ping", serde_json::json!({})), Duration::from_secs(5)).await.map(drop));
        machine_interrupt Use |f, c, p| of_a_machine(f.w.engine.machine_interrupt(c, p, "run").await);
        machine_wake Use |f, c, p| of_a_machine(f.w.engine.machine_wake(c, p, "run").await);
        machine_threshold Use |f, c, p| of_a_machine(f.w.engine.machine_threshold(c, p, "run", "scsi0", 1).await);
        machine_memory_period Use |f, c, p| of_a_machine(f.w.engine.machine_memory_period(c, p, "run", 1).await);
        instance_neighbours View |f, c, p| f.w.engine.instance_neighbours(c, p, "run").await.map(drop);
        machine_dirty_rate Use |f, c, p| of_a_machine(f.w.engine.machine_dirty_rate(c, p, "run", (1, Default::default())).await);
        machine_monitor ServerEdit |f, c, p| of_a_machine(f.w.engine.machine_monitor(c, HERE, "run", "query-status", serde_json::json!({})).await.map(drop));
        machine_events ServerEdit |f, c, p| f.w.engine.machine_events(c).await.map(drop);
        file_open Use |f, c, p| f.w.engine.file_open(c, p, "run", "/").await.map(drop);
        file_write Use |f, c, p| f.w.engine.file_write(c, p, "run", FileWrite { path: "/tmp/x".into(), kind: FileKind::Symlink, uid: None, gid: None, mode: None, append: false, target: Some("y".into()) }).await.map(drop);
        file_delete Use |f, c, p| {
            let write = FileWrite { path: "/tmp/z".into(), kind: FileKind::Symlink, uid: None, gid: None, mode: None, append: false, target: Some("y".into()) };
            f.w.engine.file_write(&f.w.admin, HERE, "run", write).await?;
            f.w.engine.file_delete(c, p, "run", "/tmp/z").await
        };
        // Storage.
        volumes View |f, c, p| f.w.engine.volumes(c, "default", Some(p)).map(drop);
        snapshots View |f, c, p| f.w.engine.snapshots(c, of_still(p)).map(drop);
        snapshot_gaps View |f, c, p| f.w.engine.snapshot_gaps(c, p, "still").map(drop);
        snapshot View |f, c, p| f.w.engine.snapshot(c, of_still(p), "snap").map(drop);
        snapshot_create Edit |f, c, p| f.w.engine.snapshot_create(c, of_still(p), CreateSnapshot::default()).await.map(drop);
        snapshot_update Edit |f, c, p| f.w.engine.snapshot_update(c, of_still(p), "snap", UpdateSnapshot::default()).await;
        snapshot_rename Edit |f, c, p| f.w.engine.snapshot_rename(c, of_still(p), "snap", "renamed").await;
        snapshot_restore Edit |f, c, p| f.w.engine.snapshot_restore(c, of_still(p), "snap").await.map(drop);
        snapshot_restore_with Edit |f, c, p| f.w.engine.snapshot_restore_with(c, of_still(p), "snap", false).await.map(drop);
        snapshot_restore_paused Edit |f, c, p| match f.w.engine.snapshot_restore_paused(c, of_still(p), "snap").await.map(drop) { Err(e) if e.kind == ErrorKind::Invalid => Ok(()), other => other };
        snapshot_delete Edit |f, c, p| f.w.engine.snapshot_delete(c, of_still(p), "snap").await.map(drop);
        instance_move Edit |f, c, p| f.w.engine.instance_move(c, p, "still", karst_engine::compute::relocate::MoveInstance { name: Some("moved".into()), ..Default::default() }).await.map(drop);
        disk_copy_begin Edit |f, c, p| of_a_machine(f.w.engine.disk_copy_begin(c, p, "run", CopyDisk { device: None, to: CopyTarget::Pool("second".into()), hold: false, speed: 0, synchronous: false }).await.map(drop));
        disk_copy View |f, c, p| { let found = f.w.engine.disk_copy(c, p, "run").await?; assert!(found.is_none(), "nothing is copied"); Ok(()) };
        disk_copy_end Edit |f, c, p| nothing_is_copied(f.w.engine.disk_copy_end(c, p, "run", "root", karst_model::guest::DiskCopyEnd::Cancel, true).await);
        disk_copy_speed Edit |f, c, p| nothing_is_copied(f.w.engine.disk_copy_speed(c, p, "run", "root", 1).await);
        disk_layers View |f, c, p| f.w.engine.disk_layers(c, p, "run").map(drop);
        layers_create Edit |f, c, p| of_a_machine(f.w.engine.layers_create(c, p, "run", karst_engine::layers::create::CreateLayers::default()).await.map(drop));
        layers_merge Edit |f, c, p| of_a_machine(f.w.engine.layers_merge(c, p, "run", pull()).await.map(drop));
        checkpoints View |f, c, p| f.w.engine.checkpoints(c, p, "run").map(drop);
        checkpoint_marks View |f, c, p| of_a_machine(f.w.engine.checkpoint_marks(c, p, "run").await.map(drop));
        checkpoint_create Edit |f, c, p| of_a_machine(f.w.engine.checkpoint_create(c, p, "run", CreateCheckpoint { name: "c".into(), ..Default::default() }).await.map(drop));
        checkpoint_describe Edit |f, c, p| there_is_no_checkpoint(f.w.engine.checkpoint_describe(c, p, "run", "c", "x").await);
        checkpoint_delete Edit |f, c, p| there_is_no_checkpoint(f.w.engine.checkpoint_delete(c, p, "run", "c").await.map(drop));
        disk_backup_begin Edit |f, c, p| of_a_machine(f.w.engine.disk_backup_begin(c, p, "run", BeginBackup { disks: vec![], checkpoint: None, listen: None, limit: None }).await.map(drop));
        disk_backup View |f, c, p| { let found = f.w.engine.disk_backup(c, p, "run").await?; assert!(found.is_none(), "nothing is backed up"); Ok(()) };
        disk_backup_end Edit |f, c, p| nothing_is_copied(f.w.engine.disk_backup_end(c, p, "run").await);
        instance_rebuild Edit |f, c, p| f.w.engine.instance_rebuild(c, p, "still", karst_engine::compute::create::InstanceSource::None).await.map(drop);
        instance_copy Edit |f, c, p| f.w.engine.instance_copy(c, p, CopyInstance { project: p.into(), name: "still".into(), snapshot: None, instance_only: false, refresh: false, exclude_older: false, copy: container("copied") }).await.map(drop);
        backups View |f, c, p| f.w.engine.backups(c, of_still(p)).map(drop);
        backup View |f, c, p| f.w.engine.backup(c, of_still(p), "kept").map(drop);
        backup_open Edit |f, c, p| f.w.engine.backup_open(c, of_still(p), "kept").await.map(drop);
        backup_create Edit |f, c, p| f.w.engine.backup_create(c, of_still(p), CreateBackup::default()).await.map(drop);
        backup_rename Edit |f, c, p| f.w.engine.backup_rename(c, of_still(p), "kept", "renamed").await;
        backup_delete Edit |f, c, p| f.w.engine.backup_delete(c, of_still(p), "kept").await.map(drop);
        backup_upload Edit |f, c, p| f.w.engine.backup_upload(c, p).map(drop);
        backup_upload_open Edit |f, c, p| f.w.engine.backup_upload_open(c, p, karst_model::BackupId(uuid::Uuid::from_u128(9))).await.map(drop);
        instance_import Edit |f, c, p| { let upload = upload(&f.w, of_still(HERE)).await?; f.w.engine.instance_import(c, p, ImportInstance { upload, name: Some("imported".into()), pool: None }).await.map(drop) };
        volume_import Edit |f, c, p| { let upload = upload(&f.w, of_still(HERE)).await?; f.w.engine.volume_import(c, p, "default", ImportVolume { upload, name: Some("disc".into()), disc: true }).await.map(drop) };
        recover_validate ServerEdit |f, c, _p| f.w.engine.recover_validate(c, &[]).await.map(drop);
        recover_import ServerEdit |f, c, _p| f.w.engine.recover_import(c, &[]).await.map(drop);
        recover_pool ServerEdit |f, c, _p| f.w.engine.recover_pool(c, &RecoverPool { name: "forgotten".into(), driver: "dir".into(), ..Default::default() }).await.map(drop);
        recover_volume ServerEdit |f, c, _p| f.w.engine.recover_volume(c, "default", f.forgotten).await.map(drop);
        custom_volume View |f, c, p| f.w.engine.custom_volume(c, p, "default", "data").map(drop);
        volume_create Edit |f, c, p| f.w.engine.volume_create(c, p, "default", volume("fresh")).await.map(drop);
        volume_copy Edit |f, c, p| f.w.engine.volume_copy(c, p, "default", CopyVolume { project: p.into(), pool: "default".into(), name: "data".into(), snapshot: None, volume_only: false, refresh: false, exclude_older: false, copy: volume("copied") }).await.map(drop);
        volume_update Edit |f, c, p| f.w.engine.volume_update(c, p, "default", "data", UpdateVolume { description: "x".into(), config: Config::new(), if_version: None }).await.map(drop);
        volume_move Edit |f, c, p| f.w.engine.volume_move(c, p, "default", "data", karst_engine::volumes::relocate::MoveVolume { name: Some("moved".into()), pool: Some("second".into()), project: None }).await.map(drop);
        volume_rename Edit |f, c, p| f.w.engine.volume_rename(c, p, "default", "data", "renamed").await;
        volume_wipe Edit |f, c, p| f.w.engine.volume_wipe(c, p, "default", "data").await.map(drop);
        volume_image Edit |f, c, p| f.w.engine.volume_image(c, p, "default", "blocks").await.map(drop);
        volume_open Edit |f, c, p| f.w.engine.volume_open(c, p, "default", "blocks").await.map(drop);
        volume_upload Edit |f, c, p| f.w.engine.volume_upload(c, p, 1).map(drop);
        volume_writable Edit |f, c, p| f.w.engine.volume_writable(c, p, "default", "blocks", (0, 1));
        volume_write Edit |f, c, p| { let upload = upload(&f.w, of_still(HERE)).await?; f.w.engine.volume_write(c, p, "default", "blocks", WriteVolume { upload, length: 1, offset: 0, image: false }).await.map(drop) };
        volume_file_open Use |f, c, p| f.w.engine.volume_file_open(c, data(p), "/").await.map(drop);
        volume_file_write Use |f, c, p| f.w.engine.volume_file_write(c, data(p), link("/x")).await.map(drop);
        volume_file_delete Use |f, c, p| {
            f.w.engine.volume_file_write(&f.w.admin, data(HERE), link("/z")).await?;
            f.w.engine.volume_file_delete(c, data(p), "/z").await
        };
        volume_delete Edit |f, c, p| f.w.engine.volume_delete(c, p, "default", "data").await.map(drop);
        // Networks.
        networks View |f, c, p| f.w.engine.networks(c, p).map(drop);
        network View |f, c, p| f.w.engine.network(c, p, "net1").map(drop);
        network_leases View |f, c, p| f.w.engine.network_leases(c, p, "net1").await.map(drop);
        network_state View |f, c, p| f.w.engine.network_state(c, p, "net1").await.map(drop);
        network_create SharedEdit |f, c, p| f.w.engine.network_create(c, p, CreateNetwork::automatic("fresh")).await.map(drop);
        network_update SharedEdit |f, c, p| f.w.engine.network_update(c, p, "net1", UpdateNetwork { description: "x".into(), config: f.w.engine.network(&f.w.admin, "default", "net1")?.config.clone(), if_version: None }).await.map(drop);
        network_delete SharedEdit |f, c, p| f.w.engine.network_delete(c, p, "net1").await.map(drop);
        network_rename SharedEdit |f, c, p| f.w.engine.network_rename(c, p, "net1", "net2").await.map(drop);
        network_demand_change SharedEdit |f, c, p| f.w.engine.network_demand_change(c, p);
        network_stop SharedEdit |f, c, p| f.w.engine.network_stop(c, p, "net1").await.map(drop);
        network_start SharedEdit |f, c, p| { off(&f.w).await?; f.w.engine.network_start(c, p, "net1").await.map(drop) };
        network_start_as SharedEdit |f, c, p| { off(&f.w).await?; let as_is = net1(&f.w)?; f.w.engine.network_start_as(c, p, "net1", &as_is).await.map(drop) };
        network_set_autostart SharedEdit |f, c, p| f.w.engine.network_set_autostart(c, p, "net1", false).await.map(drop);
        network_define SharedEdit |f, c, p| f.w.engine.network_define(c, p, "net1", UpdateNetwork { description: "x".into(), config: net1(&f.w)?, if_version: None }).await.map(drop);
        network_change_sides SharedEdit |f, c, p| f.w.engine.network_change_sides(c, p, "net1", NetworkSides { defined: Some(net1(&f.w)?), ..Default::default() }).await.map(drop);
        network_undefine SharedEdit |f, c, p| f.w.engine.network_undefine(c, p, "net1").await.map(drop);
        network_explain View |f, c, p| f.w.engine.network_explain(c, p, "192.0.2.1", "192.0.2.2", "80").await.map(drop);
        acls View |f, c, p| f.w.engine.acls(c, p).map(drop);
        acl View |f, c, p| f.w.engine.acl(c, p, "web").map(drop);
        acl_create SharedEdit |f, c, p| f.w.engine.acl_create(c, p, "fresh", UpdateAcl::default()).await.map(drop);
        acl_update SharedEdit |f, c, p| f.w.engine.acl_update(c, p, "web", UpdateAcl { description: "x".into(), ..Default::default() }).await.map(drop);
        acl_rename SharedEdit |f, c, p| f.w.engine.acl_rename(c, p, "web", "web2").await.map(drop);
        acl_log SharedEdit |f, c, p| f.w.engine.acl_log(c, p, "web").await.map(drop);
        acl_delete SharedEdit |f, c, p| f.w.engine.acl_delete(c, p, "web").await.map(drop);
        acl_used_by Filtered |f, c, p| { let acl = f.w.engine.acl(&f.w.admin, "default", "used")?; demand_nothing_hidden(f, c, f.w.engine.acl_used_by(c, &acl)) };
        address_sets View |f, c, p| f.w.engine.address_sets(c, p).map(drop);
        address_set View |f, c, p| f.w.engine.address_set(c, p, "office").map(drop);
        address_set_used_by Filtered |f, c, p| { let set = f.w.engine.address_set(&f.w.admin, "default", "office")?; assert!(f.w.engine.address_set_used_by(c, &set).is_empty()); Ok(()) };
        address_set_create SharedEdit |f, c, p| f.w.engine.address_set_create(c, p, "fresh", UpdateAddressSet::default()).await.map(drop);
        address_set_update SharedEdit |f, c, p| f.w.engine.address_set_update(c, p, "office", UpdateAddressSet { description: "x".into(), ..Default::default() }).await.map(drop);
        address_set_rename SharedEdit |f, c, p| f.w.engine.address_set_rename(c, p, "office", "home").await.map(drop);
        address_set_delete SharedEdit |f, c, p| f.w.engine.address_set_delete(c, p, "office").await.map(drop);
        forwards View |f, c, p| f.w.engine.forwards(c, p, "net1").await.map(drop);
        forward View |f, c, p| f.w.engine.forward(c, p, "net1", LISTEN).await.map(drop);
        forward_create SharedEdit |f, c, p| f.w.engine.forward_create(c, p, "net1", "192.0.2.51", UpdateForward::default()).await.map(drop);
        forward_update SharedEdit |f, c, p| f.w.engine.forward_update(c, p, "net1", LISTEN, UpdateForward { description: "x".into(), ..Default::default() }).await.map(drop);
        forward_delete SharedEdit |f, c, p| f.w.engine.forward_delete(c, p, "net1", LISTEN).await.map(drop);
        registry_logins View |f, c, p| f.w.engine.registry_logins(c, p).map(drop);
        registry_login_set Edit |f, c, p| f.w.engine.registry_login_set(c, p, karst_engine::images::registries::NewLogin { host: "registry.example".into(), user: "robot".into(), password: value(), certificate: None }).await;
        registry_login_remove Edit |f, c, p| match f.w.engine.registry_login_remove(c, p, "registry.example").await { Err(e) if e.kind == ErrorKind::NotFound && e.message.contains("at registry") => Ok(()), other => other };
        secrets View |f, c, p| f.w.engine.secrets(c, p).map(drop);
        secret View |f, c, p| f.w.engine.secret(c, p, SECRET).map(drop);
        secret_by_use View |f, c, p| f.w.engine.secret_by_use(c, p, SecretUse::Volume, "v1").map(drop);
        secret_define Edit |f, c, p| f.w.engine.secret_define(c, p, secret(uuid::Uuid::from_u128(2), "v2")).await.map(drop);
        secret_undefine Edit |f, c, p| f.w.engine.secret_undefine(c, p, SECRET).await;
        secret_set_value Edit |f, c, p| f.w.engine.secret_set_value(c, p, SECRET, value()).await;
        secret_value Edit |f, c, p| f.w.engine.secret_value(c, p, SECRET).map(drop);
        // What follows has no answer to refuse: it leaves out what the caller may not see (see the tests below).
        network_used_by Filtered |f, c, p| { let n = f.w.engine.network(&f.w.admin, "default", "karstbr0")?; demand_nothing_hidden(f, c, f.w.engine.network_used_by(c, &n)) };
        pool_used_by Filtered |f, c, p| { let n = f.w.engine.pool(&f.w.admin, "default")?; demand_nothing_hidden(f, c, f.w.engine.pool_used_by(c, &n)) };
        // Images.
        images View |f, c, p| f.w.engine.images(c, p).map(drop);
        image View |f, c, p| f.w.engine.image(c, p, "debian/12").map(drop);
        image_export View |f, c, p| f.w.engine.image_export(c, p, "debian/12").await.map(drop);
        image_aliases View |f, c, p| f.w.engine.image_aliases(c, p, None).map(drop);
        image_alias View |f, c, p| f.w.engine.image_alias(c, p, "debian/12", None).map(drop);
        image_alias_create Edit |f, c, p| f.w.engine.image_alias_create(c, p, "fresh", "", "debian/12").await;
        image_alias_update Edit |f, c, p| f.w.engine.image_alias_update(c, p, "debian/12", Some("x"), None).await;
        image_alias_rename Edit |f, c, p| f.w.engine.image_alias_rename(c, p, "debian/12", "renamed").await;
        image_alias_delete Edit |f, c, p| f.w.engine.image_alias_delete(c, p, "debian/12").await;
        image_upload Edit |f, c, p| f.w.engine.image_upload(c, p).map(drop);
        image_upload_part Edit |f, c, p| f.w.engine.image_upload_part(c, p, &f.w.engine.image_upload(&f.w.admin, HERE)?, ImagePart::Unified).await.map(drop);
        image_import Edit |f, c, p| f.w.engine.image_import(c, p, f.w.engine.image_upload(&f.w.admin, HERE)?, vec![ImagePart::Unified], ImageOptions::default()).await.map(drop);
        image_build Edit |f, c, p| f.w.engine.image_build(c, p, "debian/13", InstanceKind::Container, ImageOptions::default()).await.map(drop);
        image_fetch Edit |f, c, p| f.w.engine.image_fetch(c, p, FetchImage { source: source("tiny"), options: ImageOptions::default(), auto_update: false }).await.map(drop);
        instance_create_remote Edit |f, c, p| f.w.engine.instance_create_remote(c, p, container("fresh"), source("tiny")).await.map(drop);
        image_refresh Edit |f, c, p| match f.w.engine.image_refresh(c, p, "debian/12").await { Err(e) if e.is(ErrorKind::Invalid) => Ok(()), other => other.map(drop) };
        image_secret Edit |f, c, p| f.w.engine.image_secret(c, p, "debian/12").map(drop);
        image_await Edit |f, c, p| f.w.engine.image_await(c, p, &"ab".repeat(32), ImageOptions::default()).map(drop);
        image_push Edit |f, c, p| f.w.engine.image_push(c, p, "debian/12", PushImage { server: "https://images.example".into(), secret: "s".into(), ..Default::default() }).await.map(drop);
        images_shown Filtered |f, c, p| { let sees = c.principal().may(karst_model::access::Permission::ProjectView, Some(f.here)); assert_eq!(f.w.engine.images_shown(c, HERE).is_ok_and(|x| !x.is_empty()), sees); let _ = p; Ok(()) };
        image_shown Filtered |f, c, p| { let sees = c.principal().may(karst_model::access::Permission::ProjectView, Some(f.here)); assert_eq!(f.w.engine.image_shown(c, HERE, "debian/12", None).is_ok(), sees); let _ = p; Ok(()) };
        image_shown_export Filtered |f, c, p| { let sees = c.principal().may(karst_model::access::Permission::ProjectView, Some(f.here)); assert_eq!(f.w.engine.image_shown_export(c, HERE, "debian/12", None).await.is_ok(), sees); let _ = p; Ok(()) };
        image_aliases_shown Filtered |f, c, p| { let sees = c.principal().may(karst_model::access::Permission::ProjectView, Some(f.here)); assert_eq!(f.w.engine.image_aliases_shown(c, HERE, None).is_ok_and(|x| !x.is_empty()), sees); let _ = p; Ok(()) };
        image_alias_shown Filtered |f, c, p| { let sees = c.principal().may(karst_model::access::Permission::ProjectView, Some(f.here)); assert_eq!(f.w.engine.image_alias_shown(c, HERE, "debian/12", None).is_ok(), sees); let _ = p; Ok(()) };
        image_publish Edit |f, c, p| f.w.engine.image_publish(c, p, PublishImage { name: "still".into(), ..Default::default() }).await.map(drop);
        image_update Edit |f, c, p| f.w.engine.image_update(c, p, "debian/12", UpdateImage { public: false, properties: Config::new(), profiles: vec![], auto_update: None, expires_at: None, if_version: None }).await;
        image_delete Edit |f, c, p| f.w.engine.image_delete(c, p, "debian/12").await.map(drop);
    }
}

/// Public methods of the engine that take no context. Nothing may be added without a reason.
const WITHOUT_CONTEXT: &[(&str, &str)] = &[
    ("open", "makes the engine"),
    ("close", "ends it; the daemon's own"),
    ("set_hook", "the harness"),
    ("set_image_servers", "the daemon's own, at its start"),
    ("set_network_listener", "the daemon's own, at its start"),
    ("network_listener", "the daemon's own listeners"),
    ("screens_open", "the daemon's own, at its start"),
    ("scram_offered", "authentication itself"),
    ("scram_begin", "authentication itself"),
    ("scram_finish", "authentication itself"),
    ("principal_stands", "says of a principal whether it still is what it was, and nothing else"),
    ("set_secret_key", "the daemon's own, at its start"),
    ("inner", "the harness; front ends are kept from it by review"),
    ("bootstrap", "the daemon's own, at its start"),
    ("change_expected", "a hint to the host's kernel, from which nothing follows"),
    ("image_admit", "the secret says for whom it is asked"),
    ("image_came", "takes what image_admit gave"),
    ("image_came_wait", "the secret says for whom it is asked"),
    ("principal_by_certificate", "authentication itself"),
    ("principal_by_token", "authentication itself"),
    ("certificate_projects", "takes a record that a context showed"),
    ("audit_flush", "the daemon's own, at its end"),
    ("server_settings", "the daemon's own listeners"),
    ("all_metrics", "by instance id: callers join it with the instances that a context showed them"),
    ("all_machine_figures", "by instance id: callers join it with the instances that a context showed them"),
    ("volume_usage", "takes a record that a context showed"),
    ("volume_usages", "takes records that a context showed"),
    ("exec_expected", "takes an instance that exec_check showed"),
    ("project_used_by", "takes a record that a context showed; tells what is in it"),
    ("backup_upload_abandon", "takes the handle that backup_upload gave"),
];

fn demand_nothing_hidden(f: &Fixture, c: &Context, used: Vec<String>) -> Result<()> {
    let sees = c.principal().may(karst_model::access::Permission::ProjectView, Some(f.here));
    let shown = used.iter().any(|u| u.contains("project=here"));
    assert_eq!(shown, sees, "{used:?}");
    Ok(())
}

/// Name and whether it takes a context, of every public method in `impl Engine` blocks.
fn methods(directory: &Path, found: &mut Vec<(String, bool)>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            methods(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            let mut inside = false;
            let mut lines = text.lines();
            while let Some(line) = lines.next() {
                match line {
                    "impl Engine {" => inside = true,
                    "}" => inside = false,
                    _ => {}
                }
                let trimmed = line.trim_start();
                let rest = trimmed.strip_prefix("pub async fn ").or(trimmed.strip_prefix("pub fn "));
                let Some(rest) = rest.filter(|_| inside) else {
                    continue;
                };
                let mut signature = rest.to_owned();
                while !signature.contains('{') {
                    signature.push_str(lines.next().expect("a body"));
                }
                let signature = &signature[..signature.find('{').unwrap()];
                let end = signature.find(['(', '<']).unwrap();
                found.push((signature[..end].to_owned(), signature.contains(": &Context")));
            }
        }
    }
}

#[test]
fn the_table_has_every_use_case() {
    let mut found = vec![];
    methods(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/src"), &mut found);
    let with: BTreeSet<&str> = found.iter().filter(|(_, c)| *c).map(|(n, _)| n.as_str()).collect();
    let without: BTreeSet<&str> = found.iter().filter(|(_, c)| !*c).map(|(n, _)| n.as_str()).collect();
    let table: Vec<Case> = cases();
    let table: BTreeSet<&str> = table.iter().map(|c| c.name).collect();
    assert!(with.len() > 50, "the parser finds the use cases: {}", with.len());
    let missing: Vec<_> = with.difference(&table).collect();
    assert!(missing.is_empty(), "use cases without a row in the table of access: {missing:?}");
    let stale: Vec<_> = table.difference(&with).collect();
    assert!(stale.is_empty(), "rows without a use case: {stale:?}");
    let allowed: BTreeSet<&str> = WITHOUT_CONTEXT.iter().map(|(n, _)| *n).collect();
    assert_eq!(without, allowed, "public methods without a context");
}

#[test]
fn nobody_foreigners_and_the_under_privileged_are_refused() {
    SeededEnv::run(1, |env| async move {
        let f = fixture(&env).await;
        let before = f.w.fingerprint();
        let anonymous = Context::new(Principal::anonymous());
        let foreigner = who(Role::Operator, Some(f.other));
        for case in cases() {
            let name = case.name;
            let kind = |r: Result<()>| r.err().map(|e| e.kind);
            let nobody = (case.call)(&f, &anonymous, HERE).await;
            let foreign = (case.call)(&f, &foreigner, HERE).await;
            if case.need == Filtered {
                assert!(nobody.is_ok() && foreign.is_ok(), "{name}");
                continue;
            }
            if case.need == Anybody {
                assert_eq!(kind(nobody), Some(ErrorKind::Forbidden), "{name} by nobody");
                assert_eq!(kind(foreign), Some(ErrorKind::Forbidden), "{name} by a foreigner");
                continue;
            }
            assert_eq!(kind(nobody), Some(ErrorKind::Unauthenticated), "{name} by nobody");
            match case.need {
                ServerView => assert_eq!(kind(foreign), None, "{name} by a foreigner"),
                ServerHidden | ServerEditHidden => {
                    assert_eq!(kind(foreign), Some(ErrorKind::NotFound), "{name} by a foreigner")
                }
                ServerInspect | ServerEdit => {
                    assert_eq!(kind(foreign), Some(ErrorKind::Forbidden), "{name} by a foreigner")
                }
                _ => {
                    let foreign = foreign.expect_err(name);
                    assert_eq!(foreign.kind, ErrorKind::NotFound, "{name} by a foreigner: {foreign}");
                    // An existing project of others looks exactly like one that does not exist.
                    if foreign.message.contains("project") {
                        let never = (case.call)(&f, &foreigner, "never").await.expect_err(name);
                        assert_eq!(foreign.message.replace(HERE, "never"), never.message, "{name}");
                    }
                }
            }
            let too_little = match case.need {
                View | Metrics | ServerView | ServerHidden | Filtered | Anybody => None,
                ServerInspect => Some(who(Role::Metrics, None)),
                Use => Some(who(Role::Viewer, Some(f.here))),
                Edit => Some(who(Role::User, Some(f.here))),
                SharedEdit => Some(who(Role::Operator, Some(f.here))),
                ServerEdit | ServerEditHidden => Some(who(Role::Operator, None)),
            };
            if let Some(who) = too_little {
                let refused = (case.call)(&f, &who, HERE).await;
                assert_eq!(kind(refused), Some(ErrorKind::Forbidden), "{name} with too little");
            }
        }
        assert_eq!(f.w.fingerprint(), before, "refused calls change nothing");
    });
}

#[test]
fn the_right_role_is_enough() {
    for case in cases().into_iter().filter(|c| c.need != Anybody) {
        SeededEnv::run(2, |env| async move {
            let f = fixture(&env).await;
            let who = match case.need {
                View | Filtered | ServerView => who(Role::Viewer, Some(f.here)),
                Metrics => who(Role::Metrics, Some(f.here)),
                Use => who(Role::User, Some(f.here)),
                Edit => who(Role::Operator, Some(f.here)),
                SharedEdit => who(Role::Operator, Some(f.shared)),
                ServerInspect | ServerHidden => who(Role::Viewer, None),
                ServerEdit | ServerEditHidden => who(Role::Admin, None),
                Anybody => unreachable!("left out above"),
            };
            let project = if case.need == SharedEdit { "default" } else { HERE };
            match (case.call)(&f, &who, project).await {
                Ok(()) => {}
                // It runs and needs no attention: the caller was let in.
                Err(e) if case.name == "operation_attend" => assert_eq!(e.kind, ErrorKind::Conflict, "{e}"),
                Err(e) => panic!("{} with the right role: {e:?}", case.name),
            }
            f.w.engine.close();
        });
    }
}

#[test]
fn why_agrees_with_what_is_decided() {
    use karst_model::access::Permission;
    SeededEnv::run(6, |env| async move {
        let f = fixture(&env).await;
        let (e, c) = (&f.w.engine, &f.w.admin);
        let tenant =
            CertificateSettings { restricted: true, projects: vec![HERE.into()], ..settings("tenant") };
        e.certificate_add(c, certificate('f'), tenant).await.unwrap();
        e.access_grant(c, "tenant", Role::Viewer, Some(OTHER)).await.unwrap();
        for who in ["tenant", "robot", "client"] {
            let principal = match who {
                "robot" => Principal::of(
                    PrincipalId(uuid::Uuid::nil()),
                    Identity::System,
                    e.api_tokens(c).unwrap()[0].grants.clone(),
                ),
                "tenant" => e.principal_by_certificate(&"f".repeat(64), ""),
                _ => e.principal_by_certificate(&"a".repeat(64), ""),
            };
            for permission in Permission::ALL {
                for (object, project) in [
                    ("server", None),
                    ("project/here", Some(f.here)),
                    ("/1.0/instances/x?project=other", Some(f.other)),
                    ("/1.0/instances/x", Some(f.shared)),
                ] {
                    let why = e.access_why(c, who, *permission, object).unwrap();
                    assert_eq!(why.allowed, principal.may(*permission, project), "{who} {object}: {why:?}");
                    assert!(!why.because.is_empty());
                }
            }
        }
        let why = e.access_why(c, "tenant", Permission::ResourceEdit, "project/other").unwrap();
        assert_eq!(
            why.because,
            [
                "role operator in project here (the certificate is restricted to it): does not reach project other",
                "role viewer in project other (given to the certificate): does not include resource_edit"
            ]
        );
        // About himself everybody may ask, about what he sees.
        let tenant = Context::new(e.principal_by_certificate(&"f".repeat(64), ""));
        assert!(e.access_why(&tenant, "me", Permission::InstanceUse, "project/here").unwrap().allowed);
        assert_eq!(
            e.access_why(&tenant, "me", Permission::InstanceUse, "project/empty").unwrap_err().kind,
            ErrorKind::NotFound
        );
        e.access_revoke(c, "tenant", Role::Viewer, Some(OTHER)).await.unwrap();
        assert!(!e.access_why(c, "tenant", Permission::ProjectView, "project/other").unwrap().allowed);
        assert_eq!(
            e.access_revoke(c, "tenant", Role::Operator, Some(HERE)).await.unwrap_err().kind,
            ErrorKind::NotFound
        );
    });
}
