//! The protocol's services: each method is decoded, passes the gate, and goes to its handler.

use std::collections::HashMap;
use std::sync::Arc;

use coracle_faults as faults;
use coracle_protocol::protobuf::well_known_types::empty::Empty;
use coracle_protocol::ttrpc::asynchronous::transport::Listener;
use coracle_protocol::ttrpc::asynchronous::{Server, Service, TtrpcContext};
use coracle_protocol::{agent as msg, agent_ttrpc, health, health_ttrpc, ttrpc, types};

use crate::connections::Incoming;
use crate::state::Agent;
use crate::{Config, Error, Result, gate};
use crate::{
    copy_file, create, details, diagnostics, exec, hotplug, iptables, metrics, network, oom, pause, remove, sandbox,
    signal, spans, start, stats, stream, update, volume, wait,
};

/// Makes the service of a list of methods: with a handler, or without one and then answered "not supported".
macro_rules! methods {
    (handled { $($name:ident $wire:literal ($request:ty) -> $reply:ty = $handler:path;)* }
     unsupported { $($uname:ident $uwire:literal ($urequest:ty) -> $ureply:ty;)* }) => {
        /// The names on the wire of all methods of `AgentService`, those without a handler last.
        pub const METHODS: &[&str] = &[$($wire,)* $($uwire,)*];

        #[async_trait::async_trait]
        impl agent_ttrpc::AgentService for Door {
            $(async fn $name(&self, context: &TtrpcContext, request: $request) -> ttrpc::Result<$reply> {
                gate::admit($wire, &request)?;
                let span = spans::begin(context, $wire);
                let reply: Result<$reply> = async {
                    faults::at(concat!("guest.", $wire)).await?;
                    let reply = $handler(&self.0, request).await?;
                    faults::at(concat!("guest.", $wire, ".done")).await?;
                    Ok(reply)
                }
                .await;
                self.0.spans.end(span, reply.as_ref().err());
                Ok(reply?)
            })*
            $(async fn $uname(&self, _: &TtrpcContext, request: $urequest) -> ttrpc::Result<$ureply> {
                gate::admit($uwire, &request)?;
                Err(Error::Unsupported($uwire.into()).into())
            })*
        }
    };
}

/// The one entry.
struct Door(Arc<Agent>);

methods! {
    handled {
        create_sandbox "CreateSandbox" (msg::CreateSandboxRequest) -> Empty = sandbox::create;
        destroy_sandbox "DestroySandbox" (msg::DestroySandboxRequest) -> Empty = sandbox::destroy;
        create_container "CreateContainer" (msg::CreateContainerRequest) -> Empty = create::create;
        start_container "StartContainer" (msg::StartContainerRequest) -> Empty = start::start;
        remove_container "RemoveContainer" (msg::RemoveContainerRequest) -> Empty = remove::remove;
        exec_process "ExecProcess" (msg::ExecProcessRequest) -> Empty = exec::exec;
        signal_process "SignalProcess" (msg::SignalProcessRequest) -> Empty = signal::signal;
        wait_process "WaitProcess" (msg::WaitProcessRequest) -> msg::WaitProcessResponse = wait::wait;
        update_container "UpdateContainer" (msg::UpdateContainerRequest) -> Empty = update::update;
        stats_container "StatsContainer" (msg::StatsContainerRequest) -> msg::StatsContainerResponse = stats::stats;
        pause_container "PauseContainer" (msg::PauseContainerRequest) -> Empty = pause::pause;
        resume_container "ResumeContainer" (msg::ResumeContainerRequest) -> Empty = pause::resume;
        write_stdin "WriteStdin" (msg::WriteStreamRequest) -> msg::WriteStreamResponse = stream::write_stdin;
        read_stdout "ReadStdout" (msg::ReadStreamRequest) -> msg::ReadStreamResponse = stream::read_stdout;
        read_stderr "ReadStderr" (msg::ReadStreamRequest) -> msg::ReadStreamResponse = stream::read_stderr;
        close_stdin "CloseStdin" (msg::CloseStdinRequest) -> Empty = stream::close_stdin;
        tty_win_resize "TtyWinResize" (msg::TtyWinResizeRequest) -> Empty = stream::resize;
        get_oom_event "GetOOMEvent" (msg::GetOOMEventRequest) -> msg::OOMEvent = oom::next;
        get_guest_details "GetGuestDetails" (msg::GuestDetailsRequest) -> msg::GuestDetailsResponse = details::details;
        get_metrics "GetMetrics" (msg::GetMetricsRequest) -> msg::Metrics = metrics::metrics;
        reseed_random_dev "ReseedRandomDev" (msg::ReseedRandomDevRequest) -> Empty = details::reseed;
        set_guest_date_time "SetGuestDateTime" (msg::SetGuestDateTimeRequest) -> Empty = details::set_clock;
        update_interface "UpdateInterface" (msg::UpdateInterfaceRequest) -> types::Interface = network::update_interface;
        update_routes "UpdateRoutes" (msg::UpdateRoutesRequest) -> msg::Routes = network::update_routes;
        list_interfaces "ListInterfaces" (msg::ListInterfacesRequest) -> msg::Interfaces = network::list_interfaces;
        list_routes "ListRoutes" (msg::ListRoutesRequest) -> msg::Routes = network::list_routes;
        add_arp_neighbors "AddARPNeighbors" (msg::AddARPNeighborsRequest) -> Empty = network::add_neighbours;
        remove_stale_virtiofs_share_mounts "RemoveStaleVirtiofsShareMounts" (msg::RemoveStaleVirtiofsShareMountsRequest) -> Empty = diagnostics::look_at_shares;
        get_diagnostic_data "GetDiagnosticData" (msg::GetDiagnosticDataRequest) -> msg::GetDiagnosticDataResponse = diagnostics::data;
        get_ip_tables "GetIPTables" (msg::GetIPTablesRequest) -> msg::GetIPTablesResponse = iptables::get;
        set_ip_tables "SetIPTables" (msg::SetIPTablesRequest) -> msg::SetIPTablesResponse = iptables::set;
        online_cpu_mem "OnlineCPUMem" (msg::OnlineCPUMemRequest) -> Empty = hotplug::online;
        copy_file "CopyFile" (msg::CopyFileRequest) -> Empty = copy_file::copy;
        add_swap "AddSwap" (msg::AddSwapRequest) -> Empty = hotplug::add_swap;
        add_swap_path "AddSwapPath" (msg::AddSwapPathRequest) -> Empty = hotplug::add_swap_path;
        get_volume_stats "GetVolumeStats" (msg::VolumeStatsRequest) -> coracle_protocol::csi::VolumeStatsResponse = volume::stats;
        resize_volume "ResizeVolume" (msg::ResizeVolumeRequest) -> Empty = volume::resize;
    }
    unsupported {
        update_ephemeral_mounts "UpdateEphemeralMounts" (msg::UpdateEphemeralMountsRequest) -> Empty;
        mem_agent_memcg_set "MemAgentMemcgSet" (msg::MemAgentMemcgConfig) -> Empty;
        mem_agent_compact_set "MemAgentCompactSet" (msg::MemAgentCompactConfig) -> Empty;
        mem_hotplug_by_probe "MemHotplugByProbe" (msg::MemHotplugByProbeRequest) -> Empty;
        set_policy "SetPolicy" (msg::SetPolicyRequest) -> Empty;
    }
}

struct Health;

#[async_trait::async_trait]
impl health_ttrpc::Health for Health {
    async fn check(
        &self,
        _: &TtrpcContext,
        request: health::CheckRequest,
    ) -> ttrpc::Result<health::HealthCheckResponse> {
        gate::admit("Check", &request)?;
        let status = health::health_check_response::ServingStatus::SERVING.into();
        Ok(health::HealthCheckResponse { status, ..Default::default() })
    }

    async fn version(
        &self,
        _: &TtrpcContext,
        request: health::CheckRequest,
    ) -> ttrpc::Result<health::VersionCheckResponse> {
        gate::admit("Version", &request)?;
        Ok(health::VersionCheckResponse {
            grpc_version: "0.0.1".into(),
            agent_version: coracle_protocol::VERSION.into(),
            ..Default::default()
        })
    }
}

/// Serves the protocol on what `listener` accepts, until what comes back is dropped. Processes' streams come by `streams`.
///
/// # Errors
/// [`Error::System`] where the server does not start.
pub async fn serve(config: Config, listener: Listener, streams: Incoming) -> Result<Serving> {
    // The engine's first process of each container outlives its parent by design; it must come to us.
    rustix::process::set_child_subreaper(rustix::process::Pid::from_raw(1))
        .map_err(Error::system("become a subreaper"))?;
    let agent = Agent::new(config);
    let fill = tokio::spawn(Arc::clone(&agent.connections).fill(streams));
    let own = spans::service(&agent);
    let mut services: HashMap<String, Service> = agent_ttrpc::create_agent_service(Arc::new(Door(agent)));
    services.extend(own);
    services.extend(health_ttrpc::create_health(Arc::new(Health)));
    let mut server = Server::new().add_listener(listener).register_service(services);
    server
        .start()
        .await
        .map_err(|error| Error::System { step: "serve".into(), source: std::io::Error::other(error.to_string()) })?;
    Ok(Serving { _server: server, fill })
}

/// What is served; nothing any more where this is dropped.
pub struct Serving {
    _server: Server,
    fill: tokio::task::JoinHandle<()>,
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.fill.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_of_the_protocol_passes_the_gate() {
        let file = msg::file_descriptor().proto();
        let service = file.service.iter().find(|service| service.name() == "AgentService").unwrap();
        let mut expected: Vec<&str> = service.method.iter().map(|method| method.name()).collect();
        let mut listed = METHODS.to_vec();
        expected.sort_unstable();
        listed.sort_unstable();
        assert_eq!(listed, expected);
    }
}
